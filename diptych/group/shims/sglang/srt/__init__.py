"""Module names that manifests written for SGLang use. On the path of local pods only."""
