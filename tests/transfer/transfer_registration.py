"""What a prefill engine registers with its bootstrap service."""

from __future__ import annotations

from diptych.transfer.bootstrap import Registration, register
from diptych.transfer.tcp import split_host_port


def registrations(terms, grid, control_address, boot_id, kv_dtype, http_port):
    """What the ranks of one prefill server register: rank 0 speaks for all of them."""
    host, port = split_host_port(control_address.partition("://")[2])
    return [
        Registration(
            attn_tp_size=grid.tp,
            attn_tp_rank=rank % grid.tp,
            pp_size=grid.pp,
            pp_rank=rank // grid.tp,
            rank_ip=host,
            rank_port=port,
            page_size=terms.page_size,
            kv_cache_dtype=kv_dtype,
            kv_layout=terms.layout,
            prefill_http_port=http_port,
            control_address=control_address,
            boot_id=boot_id,
            fingerprint=terms.fingerprint,
        )
        for rank in range(grid.num_ranks)
    ]


async def announce(host, port, ranks, secret, timeout_s):
    for rank in ranks:
        await register(host, port, rank, secret, timeout_s)
