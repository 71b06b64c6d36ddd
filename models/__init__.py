"""The methods by the name that --method takes."""

from models.asymvlm import PowerSphericalAdaptor, VonMisesFisherAdaptor
from models.pcmepp import PCMEPPAdaptor
from models.pfe import PFEAdaptor
from models.probvlm import ProbVLMAdaptor
from models.prolip import ProLIPAdaptor

METHODS = {
    "asymvlm-psd": PowerSphericalAdaptor,
    "asymvlm-vmf": VonMisesFisherAdaptor,
    "probvlm": ProbVLMAdaptor,
    "pfe": PFEAdaptor,
    "pcmepp": PCMEPPAdaptor,
    "prolip": ProLIPAdaptor,
}
