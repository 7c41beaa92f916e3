package e2e

import "testing"

// 2000 idle tunnels cost at most 15 KiB of resident memory each, also after each has
// echoed 64 KiB. Their goroutines' stacks are small: they have not gone deep before.
func TestPassthroughIdleMemory(t *testing.T) {
	const most, mostStacks = 15.0, 5.0
	kind := contenders[0]
	idle, used := idleCost(t, kind.start(t, kind.name, tcpBackend(t, serveRelayed)))
	for when, m := range map[string]memory{"before": idle, "after": used} {
		t.Logf("KiB per idle tunnel %s an echo of 64 KiB: %.1f, stacks %.1f", when, m.resident, m.stacks)
		if m.resident > most || m.stacks > mostStacks {
			t.Errorf("KiB per idle tunnel %s an echo of 64 KiB: got %.1f, stacks %.1f; want at most %.0f and %.0f",
				when, m.resident, m.stacks, most, mostStacks)
		}
	}
}
