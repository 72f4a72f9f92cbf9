"""Reports: reads files of results, and nothing else of ours.

load      files of results, checked against `schemas/result.schema.json`
pages     one page of them: HTML, Markdown, pictures
claims    the paper's claims beside what the files say
collect   runs what writes the files, by command
"""
