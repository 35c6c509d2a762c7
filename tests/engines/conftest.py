"""Programs that tests run in environments of their own are no tests."""

collect_ignore_glob = ["[!t]*.py"]
