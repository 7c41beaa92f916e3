// This file replaces upstreams by reloads, under clients that chat all the time.

package e2e

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// A reload replaces all upstreams of routes. Their clients, which do not pause, are
// moved over the drain window: none is dropped, and no message is lost or comes twice,
// in either direction. The long form has 300 clients of each route, one after the other.
func TestBlueGreen(t *testing.T) {
	settings := []string{"replay unacked", "replay unsent", "replay strict", "replay off", "resume_timeout off", "ping_interval off"}
	if !full {
		testBlueGreen(t, 12, settings...)
		return
	}
	for _, s := range settings {
		t.Run(s, func(t *testing.T) { testBlueGreen(t, 300, s) })
	}
}

// testBlueGreen has routes with these settings, and so many clients of each.
func testBlueGreen(t *testing.T, clients int, settings ...string) {
	window := long(4*time.Second, 10*time.Second)
	var old, blue []*backendProcess
	for _, kind := range []string{"coder", "gorilla", "node"} {
		old, blue = append(old, startBackend(t, kind, "old-"+kind)), append(blue, startBackend(t, kind, "new-"+kind))
	}
	site := func(to []*backendProcess) string {
		var s strings.Builder
		for i, more := range settings {
			fmt.Fprintf(&s, "handle /%d {\n websocket_proxy %s %s %s {\n name route%d\n drain_window %v\n %s\n }\n}\n",
				i, to[0].addr, to[1].addr, to[2].addr, i, window, more)
		}
		return s.String()
	}
	p := startCaddy(t, "metrics", site(old))
	var all []*talker // client i is one of route i % len(settings)
	for i := range clients * len(settings) {
		all = append(all, dialTalker(t, p, i, fmt.Sprintf("/%d?echo=1", i%len(settings))))
	}
	for _, k := range all {
		k.start()
	}
	on := func(now stats, backends []*backendProcess) (n int) {
		for _, b := range backends {
			n += now.ByUpstream[b.addr]
		}
		return n
	}
	pass(500 * time.Millisecond)
	if now := p.stats(t); on(now, old) != len(all) {
		t.Fatalf("connections before the reload: got %v, want all on the old upstreams", now.ByUpstream)
	}

	asked := time.Now()
	p.reload(t, p.siteConfig("metrics", site(blue)))
	loaded := time.Now()
	var now stats
	if !eventually(window+slack, func() bool {
		now = p.stats(t)
		return on(now, blue) == len(all) && now.ByState["open"] == len(all)
	}) {
		t.Errorf("connections after the window: got %v on %v, want all %d open on the new upstreams", now.ByState, now.ByUpstream, len(all))
	}
	t.Logf("reload took %v, all had moved %v later: %v", loaded.Sub(asked), time.Since(loaded), now.ByUpstream)
	for _, b := range blue { // each route balances its own
		if n := now.ByUpstream[b.addr]; n < len(all)/3-2*len(settings) || n > len(all)/3+2*len(settings) {
			t.Errorf("connections of the new upstreams: got %v, want about as many on each", now.ByUpstream)
			break
		}
	}
	moved := make(map[string]string)
	for i := range settings {
		moved[fmt.Sprintf(`caddy_connections_migrations_total{result="moved",route="route%d"}`, i)] = fmt.Sprint(clients)
	}
	p.wantMetrics(t, moved)
	if !eventually(20*time.Second, func() bool { return !slices.ContainsFunc(all, func(k *talker) bool { return k.sent.Load() < 20 }) }) {
		t.Error("clients have hardly sent a message: the test is void")
	}
	finishTalkers(t, all)

	began := make([][]time.Time, len(settings)) // when connections arrived on a new backend, by route
	var sum summary
	of := make(map[int][]*backendConn)
	for _, conns := range backendConns(t, slices.Concat(old, blue)...) {
		of[senderOf(conns)] = conns
	}
	for _, k := range all {
		route := k.id % len(settings)
		fault := func(format string, args ...any) {
			t.Helper()
			t.Errorf(settings[route]+": "+format, args...)
		}
		del := &delivery{client: k.id, sent: int(k.sent.Load()), ended: k.end, conns: of[k.id]}
		for _, f := range del.faults(promise{}, 1001) {
			fault("%s", f)
		}
		sum.add(del)
		if k.fault != "" {
			fault("client %d: %s", k.id, k.fault)
		}
		switch conns := del.conns; {
		case len(conns) != 2:
			fault("client %d: got %d connections to backends, want two: %v", k.id, len(conns), conns)
		case conns[0].code != 1001:
			fault("client %d: its old backend got close code %d, want 1001", k.id, conns[0].code)
		case conns[1].resume != "attempt=1, replayed=0, cause=1001":
			fault("client %d: got Holdfast-Resume %q", k.id, conns[1].resume)
		default:
			began[route] = append(began[route], time.Unix(0, conns[1].opened))
		}
	}
	t.Logf("%v", &sum)
	for _, times := range began {
		wantSpread(t, times, asked, loaded, window)
	}
}

// wantSpread checks that moves began evenly over a window that began between two
// times, the last one at its end.
func wantSpread(t *testing.T, began []time.Time, from, to time.Time, window time.Duration) {
	t.Helper()
	if len(began) == 0 {
		t.Error("nothing was moved")
		return
	}
	slices.SortFunc(began, time.Time.Compare)
	const busy = 2 * time.Second // is how late a machine may be
	n := len(began)
	var worst time.Duration
	for i, at := range began {
		due := time.Duration(float64(window) * float64(i+1) / float64(n))
		early, late := from.Add(due).Sub(at), at.Sub(to.Add(due))
		worst = max(worst, late)
		if early > 50*time.Millisecond || late > busy {
			t.Errorf("move %d of %d: it began %v after the reload, want it after %v", i+1, n, at.Sub(to), due)
			break
		}
	}
	// No burst: within a tenth of the window not more than half of them.
	for i, j := 0, 0; i < n; i++ {
		for began[i].Sub(began[j]) > window/10 {
			j++
		}
		if i-j+1 > n/2+1 {
			t.Errorf("%d of %d moves began within %v", i-j+1, n, window/10)
			break
		}
	}
	t.Logf("%d moves, the first after %v, the last after %v of %v, at most %v late", n, began[0].Sub(to), began[n-1].Sub(to), window, worst)
}

// long2 is long for numbers.
func long2(short, other int) int {
	if full {
		return other
	}
	return short
}

// With a drain window of zero all are moved at once.
func TestDrainWindowZero(t *testing.T) {
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")
	site := func(to *backendProcess) string {
		return fmt.Sprintf("websocket_proxy %s {\n drain_window 0s\n}", to.addr)
	}
	p := startCaddy(t, "", site(a))
	all := startTalkers(t, p, 30)
	pass(200 * time.Millisecond)
	p.reload(t, p.siteConfig("", site(b)))
	loaded := time.Now()
	p.waitOn(t, slack, map[string]int{b.addr: len(all)})
	finishTalkers(t, all)
	var last time.Duration
	for _, r := range b.records(t) {
		if r.Event == "open" {
			last = max(last, time.Unix(0, r.Time).Sub(loaded))
		}
	}
	if last > 5*time.Second { // the last one of the default begins after 10s
		t.Errorf("the last move began %v after the reload, want all at once", last)
	}
	wantWhole(t, all, 2, a, b)
}

// waitOn waits until all connections are open on these upstreams.
func (p *proxy) waitOn(t testing.TB, limit time.Duration, want map[string]int) {
	t.Helper()
	total := 0
	for _, n := range want {
		total += n
	}
	var now stats
	if !eventually(limit, func() bool {
		now = p.stats(t)
		return maps.Equal(now.ByUpstream, want) && now.ByState["open"] == total
	}) {
		t.Errorf("connections after %v: got %v on %v, want %v", limit, now.ByState, now.ByUpstream, want)
	}
}
