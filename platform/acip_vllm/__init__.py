"""A plugin for vLLM: vLLM's own models run exports and artifacts, with `vllm serve FOLDER`, `vllm.LLM(FOLDER)` or `jobs/serve.py`.

```
exports, one size each:
  shards.py          the matrices of a compressed layer, and the part of them that one worker of tensor parallelism computes with
  product.py         the product of a layer whose parts have different forms and ranks, such as fused query, key and value
  export_config.py   config.json of an export or artifact -> the config of its base model, with the forms of its layers as a quantization
  decoding.py        encoded tensors are decoded while weights are loaded
  linear_layers.py   the stored layers that a linear layer of vLLM is made of, and a worker's part of them
  engine.py          the classes that vLLM calls
artifacts, all sizes at once:
  artifacts.py       the artifact at a folder, at s3://... or in the registry
  any_size.py        layers of any size in vLLM's models: each row of a batch is computed at the size of its own sequence
  size_copies.py     copies of the sizes in use, stacked and packed like the layers of an export
  native.py          `vllm serve ARTIFACT`: a size with each request
  batch.py           vLLM computes the sequences of a resident model of acip_platform
  resident_model.py  such a model: its weights and sampling are acip_platform's
```

vLLM finds `register` by its entry point in the group vllm.general_plugins, and calls it in each of its processes.
"""

from packaging.specifiers import SpecifierSet

VERSIONS = ">=0.32,<0.33"  # of vLLM: the range that tests/vllm passes with


def register() -> None:
    """Make vLLM load exports. Calling it again changes nothing. Raise ImportError for a version of vLLM that is not supported."""
    import vllm

    check_version(vllm.__version__)
    from acip_vllm.engine import register_with_vllm

    register_with_vllm()


def check_version(version: str) -> None:
    """Raise ImportError unless a version of vLLM is in the supported range."""
    if not SpecifierSet(VERSIONS, prereleases=True).contains(version):
        raise ImportError(
            f"acip works with vLLM {VERSIONS}, but vLLM {version} is installed. Install a version in this range, or set the environment "
            'variable VLLM_PLUGINS to a list of plugins without "acip" to use vLLM without it.'
        )
