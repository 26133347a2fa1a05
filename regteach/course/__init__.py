"""The course as a whole: executed, checked, and turned into a web site.

layout (where things lie, what a run left) | offline (no network for lessons) | execute (one notebook) | run (all of
them) | page, site (the web site) | checks, symbols (notebooks as files) | student (a copy to work in, JupyterLab) |
testing (every stage of the tests) | doctor | commands (what `regteach course` does).
"""
