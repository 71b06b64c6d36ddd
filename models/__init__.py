"""The methods by the name that --method takes."""

from models.asymvlm import PowerSphericalAdaptor, VonMisesFisherAdaptor

METHODS = {
    "asymvlm-psd": PowerSphericalAdaptor,
    "asymvlm-vmf": VonMisesFisherAdaptor,
}
