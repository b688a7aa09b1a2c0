"""Text and conversations as token ids, without torch and transformers.

`tokenizer` reads the tokenizer of a checkpoint, and runs `in_child`, the process that tokenizes.
`text_tokens` has the first tokens of a text, `samples` those of calibration data, which
`calibration_data` finds and `rows` reads. `overlap` compares a text with calibration data.
"""
