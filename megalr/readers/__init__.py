"""Input files to documents, text or ids.

In: names of files, folders and data sets of the hub. Out: input splits and their documents in
batches, with bad records counted. Must not know: tokenizers, shards that are written, jobs.
"""
