"""The methods by the name that --method takes, and the groups of them that it takes too."""

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
GROUPS = {"all": tuple(METHODS)}  # the paper's six


def expand_groups(names):
    """The methods that a list of names and groups stands for, each once, members of groups first."""
    members = [method for name in names for method in GROUPS.get(name, ())]
    return list(dict.fromkeys([*members, *(name for name in names if name not in GROUPS)]))
