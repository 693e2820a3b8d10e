"""The command line: a look at a model without a line of code.

In: the name of a model. Out: text or JSON, and an exit code. What is found and done is the library's; nothing is
decided here, and no room imports this one.
"""

from torch_meanfield.command_line.main import main as main
