"""The Kubernetes operator of RoleBasedGroups: list and watch, a queue of keys, an idempotent reconcile.

Runs without torch. Nothing here decides what a group needs: that is `diptych.group.plan`, as for local groups.
"""
