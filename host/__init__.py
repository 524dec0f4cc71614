"""What lies between the package and the process around it: terminal, text, JSON, Ctrl-C, environment variables.

Imports nothing of the package, and everything may import it.
"""
