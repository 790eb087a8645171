def add_demo_options(p):
    pass
