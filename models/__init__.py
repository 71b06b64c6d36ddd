"""The methods by the name that --method takes, and the groups of them that it takes too."""

from models.asymvlm import variants
from models.asymvlm.adaptor import PowerSphericalAdaptor, VonMisesFisherAdaptor
from models.pcmepp.adaptor import PCMEPPAdaptor
from models.pfe.adaptor import PFEAdaptor
from models.probvlm.adaptor import ProbVLMAdaptor
from models.prolip.adaptor import ProLIPAdaptor

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
}
GROUPS = {"all": tuple(METHODS), "variants": tuple(VARIANTS)}  # the paper's six; asymvlm's claims, one at a time
METHODS |= VARIANTS


def expand_groups(names):
    """The methods that a list of names and groups stands for, each once, members of groups first."""
    members = [method for name in names for method in GROUPS.get(name, ())]
    return list(dict.fromkeys([*members, *(name for name in names if name not in GROUPS)]))
