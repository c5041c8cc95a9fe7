"""Data: from files or a hub name, through text and tokens, to the batches that training reads.

`sources` reads rows, `formats` finds prompts and answers in them, `encoding` turns text into tokens,
`sampling` decides which rows come when, `batches` pads them into tensors, `tokenizers` makes or loads a tokenizer.
Nothing here knows of DeepSpeed or of process groups.
"""
