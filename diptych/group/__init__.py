"""RoleBasedGroup: roles that come up together, as processes on this machine or as pods on Kubernetes.

`kinds` is the API (`crds` its definitions, `validate` its checks), `spec` a manifest for one machine. `plan` decides
what to do next (pure; every runner uses it); `local` does it with processes, `operator` on Kubernetes.
"""
