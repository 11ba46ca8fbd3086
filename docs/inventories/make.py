"""Writes the Sphinx inventories of what these pages refer to in other projects.

    python docs/inventories/make.py

A name stands here as references write it, which for classes is where they are defined, not always where the other
project documents them; the address beside it is that of the documentation.  A trailing ``$`` stands for the name.
"""

from __future__ import annotations

import zlib
from pathlib import Path

PYTHON = {
    "bool": ("class", "library/functions.html#$"),
    "collections.abc.Callable": ("class", "library/collections.abc.html#$"),
    "collections.abc.Collection": ("class", "library/collections.abc.html#$"),
    "collections.abc.Iterable": ("class", "library/collections.abc.html#$"),
    "collections.abc.Iterator": ("class", "library/collections.abc.html#$"),
    "collections.abc.Mapping": ("class", "library/collections.abc.html#$"),
    "collections.abc.Sequence": ("class", "library/collections.abc.html#$"),
    "dict": ("class", "library/stdtypes.html#$"),
    "float": ("class", "library/functions.html#$"),
    "int": ("class", "library/functions.html#$"),
    "list": ("class", "library/stdtypes.html#$"),
    "object": ("class", "library/functions.html#$"),
    "os.PathLike": ("class", "library/os.html#$"),
    "pathlib.Path": ("class", "library/pathlib.html#$"),
    "slice": ("class", "library/functions.html#$"),
    "str": ("class", "library/stdtypes.html#$"),
    "tuple": ("class", "library/stdtypes.html#$"),
    "typing.Any": ("data", "library/typing.html#$"),
    "AssertionError": ("exception", "library/exceptions.html#$"),
    "ImportError": ("exception", "library/exceptions.html#$"),
    "RuntimeError": ("exception", "library/exceptions.html#$"),
    "FloatingPointError": ("exception", "library/exceptions.html#$"),
    "TypeError": ("exception", "library/exceptions.html#$"),
    "ValueError": ("exception", "library/exceptions.html#$"),
    "None": ("data", "library/constants.html#$"),
}
TORCH = {
    "torch._C.Generator": (
        "class",
        "generated/torch.Generator.html#torch.Generator",
    ),
    "torch.Size": ("class", "size.html#$"),
    "torch.Tensor": ("class", "tensors.html#$"),
    "torch.device": ("class", "tensor_attributes.html#$"),
    "torch.dtype": ("class", "tensor_attributes.html#$"),
    "torch.distributions.constraints.Constraint": ("class", "distributions.html#$"),
    "torch.distributions.distribution.Distribution": (
        "class",
        "distributions.html#$",
    ),
    "torch.distributions.transforms.Transform": ("class", "distributions.html#$"),
    "torch.nn.modules.module.Module": (
        "class",
        "generated/torch.nn.Module.html#torch.nn.Module",
    ),
    "torch.nn.parameter.Parameter": (
        "class",
        "generated/torch.nn.parameter.Parameter.html#$",
    ),
    "torch.optim.optimizer.Optimizer": (
        "class",
        "optim.html#torch.optim.Optimizer",
    ),
}
PYRO = {
    "pyro.distributions.conditional.ConditionalTransform": (
        "class",
        "distributions.html#pyro.distributions.ConditionalTransform",
    ),
    "pyro.distributions.distribution.Distribution": (
        "class",
        "distributions.html#pyro.distributions.Distribution",
    ),
    "pyro.distributions.torch.TransformedDistribution": (
        "class",
        "distributions.html#pyro.distributions.TransformedDistribution",
    ),
    "pyro.distributions.torch_transform.TransformModule": (
        "class",
        "distributions.html#pyro.distributions.TransformModule",
    ),
    "pyro.infer.autoguide.guides.AutoContinuous": (
        "class",
        "infer.autoguide.html#pyro.infer.autoguide.AutoContinuous",
    ),
}


def write(path: Path, project: str, objects: dict[str, tuple[str, str]]) -> None:
    """One inventory, in version 2 of Sphinx's format."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = (
        f"{name} py:{role} 1 {where} -\n"
        for name, (role, where) in sorted(objects.items())
    )
    path.write_bytes(head.encode() + zlib.compress("".join(lines).encode(), 9))


if __name__ == "__main__":
    here = Path(__file__).parent
    for name, objects in (("python", PYTHON), ("torch", TORCH), ("pyro", PYRO)):
        write(here / f"{name}.inv", name, objects)
