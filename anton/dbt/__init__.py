"""dbt: a dbt project as steps of an app.

    project.py   DbtProject and its models, as apps declare them
    run.py       what the worker does with requests: coalesce, build, tell
    runner.py    the warm child process, from outside
    child.py     the same, from inside: the only module that imports dbt
    manifest.py  what Anton knows of a project
    profile.py   dbt's profile, made from Anton's own database URL
    init.py      what `anton dbt init` writes
"""
