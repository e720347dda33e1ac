"""What mitmdump is started with: `mitmdump -s mitm_addon.py`. See README.md for the whole command line."""

from runner_proxy.startup import Startup

addons = [Startup()]
