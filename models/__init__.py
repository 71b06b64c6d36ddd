"""The methods, and the groups of methods, by the names that --method takes."""

from dataclasses import replace

from models.asymvlm import variants
from models.asymvlm.adaptor import PowerSphericalAdaptor, VonMisesFisherAdaptor
from models.pcmepp.adaptor import PCMEPPAdaptor
from models.pcmepp.original import PCMEPPOriginal
from models.pfe.adaptor import PFEAdaptor
from models.pfe.original import PFEOriginal
from models.probvlm.adaptor import ProbVLMAdaptor
from models.probvlm.original import ProbVLMOriginal, ProbVLMOriginalDefaultWeight
from models.prolip.adaptor import ProLIPAdaptor
from models.prolip.original import ProLIPOriginal

# The six methods of the paper.
PAPER = {
    "asymvlm-psd": PowerSphericalAdaptor,
    "asymvlm-vmf": VonMisesFisherAdaptor,
    "probvlm": ProbVLMAdaptor,
    "pfe": PFEAdaptor,
    "pcmepp": PCMEPPAdaptor,
    "prolip": ProLIPAdaptor,
}
# AsymVLM with one of its design choices changed.
VARIANTS = {
    "asymvlm-psd-frozen": variants.PowerSphericalFrozen,
    "asymvlm-vmf-frozen": variants.VonMisesFisherFrozen,
    "asymvlm-psd-image": variants.PowerSphericalImage,
    "asymvlm-vmf-image": variants.VonMisesFisherImage,
    "asymvlm-psd-both": variants.PowerSphericalBoth,
    "asymvlm-vmf-both": variants.VonMisesFisherBoth,
    "asymvlm-psd-fixed-temperature": variants.PowerSphericalFixedTemperature,
    "asymvlm-vmf-fixed-temperature": variants.VonMisesFisherFixedTemperature,
    "asymvlm-vmf-approximate": variants.VonMisesFisherApproximate,
    "asymvlm-psd-anchored": variants.PowerSphericalAnchored,
    "asymvlm-vmf-anchored": variants.VonMisesFisherAnchored,
}
# The baselines as their own authors build and train them.
ORIGINALS = {
    "probvlm-original": ProbVLMOriginal,
    "probvlm-original-default-weight": ProbVLMOriginalDefaultWeight,
    "pfe-original": PFEOriginal,
    "pcmepp-original": PCMEPPOriginal,
    "prolip-original": ProLIPOriginal,
}
METHODS = {**PAPER, **VARIANTS, **ORIGINALS}

# Learning rates of `small` in earlier versions. FORMER_ASYMVLM_LR is that of all AsymVLM methods
# except -anchored.
FORMER_LR = {"probvlm": 3e-4, "pfe": 3e-4, "prolip": 3e-4}
FORMER_ASYMVLM_LR = 3e-3

TAG = "@"  # between a method and the tag of a second run of it
GROUPS = {"all": tuple(PAPER), "variants": tuple(VARIANTS), "originals": tuple(ORIGINALS)}


def untagged(name):
    """The method of a tagged name, which `train.py --tag` makes.

    >>> untagged("pfe@demo"), untagged("pfe")
    ('pfe', 'pfe')
    """
    return name.partition(TAG)[0]


def tagged(method, tag):
    """The name of a second run of a method, such as "pfe@demo"; without a tag, the method's own."""
    return f"{method}{TAG}{tag}" if tag else method


def expand_groups(names, recipe=None):
    """List the methods that a list of names and groups stands for, without repetition.

    The members of groups come first. A group's tag is passed on to its members.

    Args:
        names: names of methods and of groups.
        recipe: the recipe they are trained with. With "original", a method such as `pfe` stands
            for `pfe-original` if that exists.
    """
    groups = [name for name in names if untagged(name) in GROUPS]
    single_methods = [name for name in names if untagged(name) not in GROUPS]
    methods = []
    for name in groups:
        group, _, tag = name.partition(TAG)
        methods.extend(tagged(method, tag) for method in GROUPS[group])
    methods.extend(single_methods)
    if recipe == "original":
        methods = [_original_of(method) for method in methods]
    return list(dict.fromkeys(methods))


def _original_of(method):
    """The name of the method as its own authors build it, if METHODS has it, else the same name."""
    name = f"{method}-original"
    return name if name in METHODS else method


def former_recipe(method, name):
    """The recipe of this name in earlier versions, to resume their runs; None if it is unchanged.

    `small` had a batch size of 1,024, 10 epochs for every cache, and other rates for some methods.
    """
    if name != "small":
        return None
    recipe = METHODS[method].recipes[name]
    lr = FORMER_LR.get(method, recipe.lr)
    if method.startswith("asymvlm") and not method.endswith("-anchored"):
        lr = FORMER_ASYMVLM_LR
    return replace(recipe, lr=lr, batch_share=None, min_steps=None)


def recipes_for(method):
    """List the recipes that a method can be trained with, including its original authors'."""
    recipes = list(METHODS[method].recipes)
    if f"{method}-original" in METHODS:
        recipes.append("original")
    return recipes
