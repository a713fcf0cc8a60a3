"""`mlxtune doctor --check`: does what training needs work on this machine, and how fast?

Begin with `registry`, the list of checks. `worker` runs them in a process of its own, one by
one; `run` starts that process, waits for it, and starts another should one end it; `record`
makes the file and the verdict.
"""
