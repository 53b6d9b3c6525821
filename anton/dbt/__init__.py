"""dbt: a dbt project as steps of an app.

    project.py   DbtProject and its models, as apps declare them
    requests.py  what the worker does with requests: coalesce, build, tell
    gate.py      which tests run inside of which build
    runner.py    the warm child process, from outside
    child.py     the same, from inside: the only module that imports dbt
    manifest.py  what Anton knows of a project
    profile.py   dbt's profile, made from Anton's own database URL
    init.py      what `anton dbt init` writes
    lineage.py   what a project adds to the graph
    verbs.py     what `anton dbt …` does
"""
