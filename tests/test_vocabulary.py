"""One name for one thing, and American spelling."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro_flows as pf

ROOT = Path(__file__).parent.parent

#: Names that a parameter of a public callable must not have, by the name that it has here.
SYNONYMS = {
    "input_dim": "dim ndim size features num_features n_features in_features data_dim input_size",
    "event_shape": "shape input_shape image_shape data_shape",
    "context_dim": "context_size context_features cond_dim conditioning_dim",
    "context": "cond condition conditions contexts",
    "hidden_dims": "hidden hidden_dim hidden_size hidden_features hidden_units width widths units",
    "hidden_channels": "channels num_channels num_filters",
    "num_layers": "layers depth n_layers num_transforms num_flows num_steps",
    "num_blocks": "blocks n_blocks num_residual_blocks",
    "num_samples or num_noise_samples": "n draws num_draws n_draws n_samples samples nsamples",
    "num_noise_samples": "noises num_noises noise_samples",
    "num_particles": "particles n_particles",
    "num_components": "components n_components mixtures",
    "steps": "max_steps n_steps iterations num_iterations max_iter max_iterations",
    "max_epochs": "epochs num_epochs n_epochs",
    "lr": "learning_rate rate step_size",
    "kernel_size": "kernel kernel_sizes filter_size",
    "activation": "nonlinearity act activation_fn",
    "standardize": "standardise normalize normalise whiten",
    "progress": "verbose progress_bar show_progress disable_progbar",
    "seed": "random_state rng_seed",
    "generator": "rng random",
}

#: Parameters that bear one of these names and mean another thing, each with its reason.
OTHER_MEANINGS = {
    "forward_shape.shape": "torch's protocol",
    "inverse_shape.shape": "torch's protocol",
    "Head.draws.features": "the tensor of the features",
    "Head.allowed.dim": "the index of a dimension",
    "compare_moments.draws": "the draws themselves",
    "probe_modes.draws": "the draws themselves",
    "History.rate": "a column of saved fits, one entry a step",
    "resample.draws": "the draws themselves",
    "ForwardKL.draws": "the draws themselves",
}

#: Beginnings and whole words of British spelling.
WORDS = r"""
    \w*(?:neighbour|behaviour|colour|favour|flavour|honour|labour|rigour|vapour)\w* | \w*centre[sd]? | \w*centring
    | \w*learnt | spelt | spoilt | burnt | grey(?!s\b)\w* | artefacts? | judgement\w* | acknowledgement\w*
    | whilst | amongst
    | licences? | defence | offence | programmes? | sceptic\w* | fulfil | enrol | cheque | ageing
    | \w*(?:model|label|travel|cancel|signal|level|channel|total|fuel)l(?:ed|ing) | (?:analy|paraly|cataly)s(?:e|ed|ing)
    | \w*(?:standard|normal|amort|general|initial|optim|minim|maxim|regular|serial|discret|quant|binar|vector|symmetr
        |recogn|organ|parameter|summar|visual|local|real|util|categor|character|emphas|penal|special|stabil|synchron
        |linear|factor|orthogonal|diagonal|random|final|custom|priorit|ideal|equal|memor|author|central|item|formal
        |neutral|rational|trivial|plural|marginal|material|capital|digit|polar|token|crystall)
      is(?:e|ed|es|er|ers|ing|ation|ations|able)
"""
BRITISH = re.compile(rf"\b(?:{WORDS})\b", re.IGNORECASE | re.VERBOSE)
PROSE = [*ROOT.glob("pyro_flows/**/*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.py"), ROOT / "README.md"]


def public() -> Iterator[tuple[str, Callable[..., object]]]:
    """The public functions, classes and methods of the package and its modules, by name."""
    names = [name for _, name, _ in pkgutil.walk_packages(pf.__path__, "pyro_flows.")]
    seen = set()
    for module in map(importlib.import_module, ["pyro_flows", *names]):
        for name in module.__all__ if "." not in module.__name__ or hasattr(module, "__path__") else ():
            found = getattr(module, name)
            if not callable(found) or found in seen or not str(found.__module__).startswith("pyro_flows"):
                continue
            seen.add(found)
            yield name, found
            if inspect.isclass(found):
                methods = [(k, v) for k, v in vars(found).items() if inspect.isfunction(v) and not k.startswith("_")]
                yield from ((f"{name}.{k}", v) for k, v in methods)


def heirs(name: str) -> str:
    """A method of a head under the name of all heads."""
    return re.sub(r"^\w*Head\.", "Head.", name)


def test_parameters_of_one_meaning_have_one_name():
    right = {wrong: name for name, wrongs in SYNONYMS.items() for wrong in wrongs.split()}
    assert not set(right) & set(SYNONYMS)
    offenders, used = [], set()
    for name, found in public():
        try:
            parameters = inspect.signature(found).parameters
        except (TypeError, ValueError):
            continue
        for parameter in parameters:
            if parameter not in right:
                continue
            known = {f"{heirs(name)}.{parameter}", f"{name.rpartition('.')[2]}.{parameter}"} & set(OTHER_MEANINGS)
            used |= known
            if not known:
                offenders.append(f"{name}({parameter}): {right[parameter]}")
    assert not offenders, "\n".join(offenders)
    assert used == set(OTHER_MEANINGS)


def test_spelling_is_american():
    offenders = []
    for path in PROSE:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            line = line.replace("self.centres", "")  # a key of saved states
            found = [match.group() for match in BRITISH.finditer(line)]
            if found:
                offenders.append(f"{path.relative_to(ROOT)}:{number}: {', '.join(found)}")
    assert not offenders, "\n".join(offenders)
