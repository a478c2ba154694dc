"""``import megalr.hf.auto`` lets transformers' Auto classes load factorized folders by themselves.

Without it they need ``trust_remote_code=True``, and then run the folder's own copy of the code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megalr.hf.modeling_factorized import FACTORIZED

for _config, _model, _causal in FACTORIZED.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)  # type: ignore[attr-defined]
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
