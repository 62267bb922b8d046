"""RoleBasedGroup: roles that come up together, as processes on this machine or as pods on Kubernetes.

`spec` is the manifest, `plan` decides what to do next (pure; every runner uses it), `local` runs it on this machine.
"""
