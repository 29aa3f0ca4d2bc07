collect_ignore_glob = ["keel_*.py"]  # they import `verifiers`, which need not be installed
