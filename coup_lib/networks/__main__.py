"""`python -m coup_lib.networks`: the published networks, see `published`."""

from coup_lib.networks.published import main

main()
