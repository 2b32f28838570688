"""NovoLSTM for PyTorch: a fused recurrent layer whose kernels run a whole sequence on the GPU.

`NovoLSTM` is the module, called like `torch.nn.LSTM`; `functional.novolstm` the function under it; `plan` decides how
the Triton kernels are launched; `use_backend` chooses a backend for a block of code; `convert_model` puts this
package's layers into a model in place of its `nn.LSTM`s.
"""

from novolstm_triton import functional, plan
from novolstm_triton.convert import convert_model
from novolstm_triton.functional import use_backend
from novolstm_triton.module import LSTM, NovoLSTM, detach_state
from novolstm_triton.single_step import LSTMCell, NovoLSTMCell

__version__ = "0.1.0"
__all__ = [
    "LSTM",
    "LSTMCell",
    "NovoLSTM",
    "NovoLSTMCell",
    "convert_model",
    "detach_state",
    "functional",
    "plan",
    "use_backend",
]
