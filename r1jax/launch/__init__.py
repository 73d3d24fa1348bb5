"""Starts the processes of a run, here or on several hosts, and says in one line which one was lost and why.

jaxlib ends every process of a run from C++ when one of them dies, so the processes themselves cannot tell; the launcher
stands outside, knows each one's exit status and last lines, and never touches JAX.
"""
