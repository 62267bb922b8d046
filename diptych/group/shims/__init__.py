"""Folder put on the path of local pods: module names of SGLang that lead to our programs."""
