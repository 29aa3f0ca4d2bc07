"""The local web application: pages about runs, tokens and methods, drawn on this machine and asked of no other."""
