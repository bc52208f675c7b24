"""What is replaced inside mitmproxy and the libraries under it; `seams` lists it all. May import `policy`.

Neither this module nor `seams` imports mitmproxy, because `lazy_imports` has to run before mitmproxy is imported.
"""
