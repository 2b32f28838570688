"""What `novolstm` and `python -m novolstm_triton` run, on top of the library, which imports nothing from here.

`cli` declares the commands. `train` trains the byte-level language model of `bytemodel` on the text that `text` reads;
`doctor` says what would run for a layer; `tune` searches launch plans, by what `measure` measures in the processes of
`isolated`; `environment` names versions.
"""
