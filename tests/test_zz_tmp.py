from test_order_machine import *
def test_x(inorder):
    m = inorder()
    m.begin(False, [2])
    m.workers[0].lane.items.clear()
    m.die(0, True)
    m.works_all()
    print("left", m.model.left())
    m.changes(0, 4, True)
    print(m.claim(0, 3, 9, lost=True))
    m.changes(0, 4, True)
    print(m.claim(0, 3, 9), m.workers[0].lane.items, m.waiting())
    while m.start(0): pass
from collections import Counter
CALLS = Counter()
def test_y(inorder):
    for name in ("claim","start","settle","end","reclaim","leave","die","end_flush","sends","loses", "decide"):
        def wrap(name, old):
            def f(self, *a, **k):
                r = old(self, *a, **k)
                CALLS[name, r if isinstance(r, bool) else (k.get("lost") or "")] += 1
                return r
            return f
        setattr(inorder, name, wrap(name, getattr(InOrder, name)))
    for f in ("settles",): pass
    try: run_state_machine_as_test(inorder, settings=SETTINGS)
    finally: print(CALLS)
