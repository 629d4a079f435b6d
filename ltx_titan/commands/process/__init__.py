"""`ltx-titan process-dataset`, `process-videos` and `process-captions`: resumable preparation of a dataset.

`command` has the command lines, `options` their options, `pipeline` the order of the work, `stages` what is read and
encoded for each column, `loop` the resumable loop over the rows of a stage, `store` the files that are written.
"""
