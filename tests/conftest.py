"""What all tests share."""

import torch

# The nets here are tiny: threads cost more in waiting for each other than they save, most of all on cores that others use.
torch.set_num_threads(1)
