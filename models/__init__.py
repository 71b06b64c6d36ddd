"""The methods by the name that --method takes, and the groups of them that it takes too."""

from models.asymvlm import variants
from models.asymvlm.adaptor import PowerSphericalAdaptor, VonMisesFisherAdaptor
from models.pcmepp.adaptor import PCMEPPAdaptor
from models.pcmepp.original import PCMEPPOriginal
from models.pfe.adaptor import PFEAdaptor
from models.pfe.original import PFEOriginal
from models.probvlm.adaptor import ProbVLMAdaptor
from models.probvlm.original import ProbVLMOriginal
from models.prolip.adaptor import ProLIPAdaptor
from models.prolip.original import ProLIPOriginal

METHODS = {
    "asymvlm-psd": PowerSphericalAdaptor,
    "asymvlm-vmf": VonMisesFisherAdaptor,
    "probvlm": ProbVLMAdaptor,
    "pfe": PFEAdaptor,
    "pcmepp": PCMEPPAdaptor,
    "prolip": ProLIPAdaptor,
}
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
ORIGINALS = {
    "probvlm-original": ProbVLMOriginal,
    "pfe-original": PFEOriginal,
    "pcmepp-original": PCMEPPOriginal,
    "prolip-original": ProLIPOriginal,
}
# The paper's six; asymvlm's claims, one at a time; the rivals as their own authors build them.
GROUPS = {"all": tuple(METHODS), "variants": tuple(VARIANTS), "originals": tuple(ORIGINALS)}
METHODS |= VARIANTS | ORIGINALS


def expand_groups(names, recipe=None):
    """The methods that a list of names and groups stands for, each once, members of groups first.

    Args: recipe: what they are trained by: under "original", `pfe` stands for `pfe-original`, where there is one.
    """
    members = [method for name in names for method in GROUPS.get(name, ())]
    members = [*members, *(name for name in names if name not in GROUPS)]
    forms = [form if (form := f"{method}-{recipe}") in METHODS else method for method in members]
    return list(dict.fromkeys(forms))


def recipes_for(method):
    """The names of the recipes that `--method` can be given with, those of its further forms among them."""
    forms = [name.removeprefix(f"{method}-") for name in METHODS if name.startswith(f"{method}-")]
    return [*METHODS[method].recipes, *(name for name in forms if name in METHODS[f"{method}-{name}"].recipes)]
