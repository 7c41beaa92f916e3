// This file deploys backends one after the other, under clients that chat all the time.

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// Each backend in turn is drained by the API, restarted when it has no connection, and
// gets connections again when the drain is lifted. No client is dropped, no message is
// lost or comes twice, and those who leave do so over the drain window. The long form
// has 300 clients of each route, one after the other.
func TestRollingDeployByDrain(t *testing.T) {
	settings := []string{"replay unacked", "replay unsent", "replay strict"}
	if full {
		for _, s := range settings {
			t.Run(s, func(t *testing.T) { testRollingDrain(t, 300, s) })
		}
		return
	}
	testRollingDrain(t, 100, settings...)
}

func testRollingDrain(t *testing.T, clients int, settings ...string) {
	r := startRollout(t, clients, long(1500*time.Millisecond, 10*time.Second), settings...)
	for _, b := range r.backends {
		had := r.on(t, b)
		r.began()
		if got := r.drain(t, b); got != had || had == 0 {
			t.Errorf("drain of %s: got %d connections to move, want the %d that it has", b.name, got, had)
		}
		r.moves += had
		r.waitLeft(t, b)
		term(t, b)
		b.restart(t)
		if v := r.view(t, b); !v.Draining {
			t.Errorf("upstream that was restarted: got %+v, want it draining until that is lifted", v)
		}
		r.lift(t, b)
		if v := r.view(t, b); v.Draining {
			t.Errorf("upstream whose drain was lifted: got %+v", v)
		}
	}
	if got := r.on(t, r.backends[2]); got != 0 {
		t.Errorf("connections of the last one: got %d, want that nobody moves when a drain is lifted", got)
	}
	// Those who come now find it in service.
	last := dialTalker(t, r.proxy, len(r.all), "/0?echo=1")
	if got := r.on(t, r.backends[2]); got != 1 {
		t.Errorf("a new client: got %d connections at the upstream that has none, want 1", got)
	}
	last.start()
	r.all = append(r.all, last)
	r.finish(t)
}

// The same by the list of upstreams: each in turn leaves the config and comes back. It
// does not matter whether routes have a name.
func TestRollingDeployByReload(t *testing.T) {
	settings := []string{"replay unacked", "name app\n replay strict", "replay unsent"}
	clients := 20
	if full {
		clients = 100 // 300 in all
	}
	r := startRollout(t, clients, long(time.Second, 10*time.Second), settings...)
	routes := map[string]int{"http://" + r.addr + "#1": clients, "app": clients, "http://" + r.addr + "#3": clients}
	for i, b := range r.backends {
		had := r.on(t, b)
		r.moves += had
		r.began()
		r.reload(t, r.config(slices.Delete(slices.Clone(r.backends), i, i+1)))
		r.waitLeft(t, b)
		if got := r.stats(t); !maps.Equal(got.ByRoute, routes) || had == 0 {
			t.Errorf("routes without %s, which had %d connections: got %v, want %v", b.name, had, got.ByRoute, routes)
		}
		term(t, b)
		b.restart(t)
		r.reload(t, r.config(r.backends))
		if v := r.view(t, b); v.Draining || v.Connections != 0 {
			t.Errorf("upstream that came back: got %+v, want it in service, and nobody there yet", v)
		}
	}
	if got := r.stats(t).ByRoute; !maps.Equal(got, routes) {
		t.Errorf("routes: got %v, want %v", got, routes)
	}
	r.finish(t)
}

// rollout is backends that are deployed one after the other, and the clients of routes
// to all of them. Client i is one of route i % len(settings).
type rollout struct {
	*proxy
	backends []*backendProcess
	settings []string // of each route
	window   time.Duration
	all      []*talker
	steps    []time.Time // when each backend was told to be left
	moves    int         // how many there must have been
}

func startRollout(t *testing.T, clients int, window time.Duration, settings ...string) *rollout {
	t.Helper()
	r := &rollout{proxy: new(proxy), settings: settings, window: window}
	for _, kind := range []string{"coder", "gorilla", "node"} {
		r.backends = append(r.backends, startBackend(t, kind, kind))
	}
	r.proxy = startCaddy(t, "metrics", r.site(r.backends))
	for i := range clients * len(settings) {
		k := dialTalker(t, r.proxy, i, fmt.Sprintf("/%d?echo=1", i%len(settings)))
		k.pause = 100 * time.Millisecond
		r.all = append(r.all, k)
	}
	for _, k := range r.all {
		k.start()
	}
	return r
}

func (r *rollout) site(to []*backendProcess) string {
	var addrs, s strings.Builder
	for _, b := range to {
		addrs.WriteString(" " + b.addr)
	}
	for i, more := range r.settings {
		fmt.Fprintf(&s, "handle /%d {\n websocket_proxy%s {\n drain_window %v\n %s\n }\n}\n", i, &addrs, r.window, more)
	}
	return s.String()
}

func (r *rollout) config(to []*backendProcess) string { return r.siteConfig("metrics", r.site(to)) }

// began notes that a backend is about to be told.
func (r *rollout) began() { r.steps = append(r.steps, time.Now()) }

// on returns how many connections a backend has, in all routes.
func (r *rollout) on(t testing.TB, b *backendProcess) (n int) {
	t.Helper()
	for _, v := range r.views(t) {
		if v.Upstream == b.addr {
			n += v.Connections
		}
	}
	return n
}

// waitLeft waits until a backend has no connection, which it has not before the window
// ends: the last one is moved then.
func (r *rollout) waitLeft(t testing.TB, b *backendProcess) {
	t.Helper()
	if !eventually(r.window+20*time.Second, func() bool { return r.on(t, b) == 0 }) {
		t.Fatalf("connections that have not left: %+v", r.views(t))
	}
}

// drain asks for a backend to be left and returns how many connections are to.
func (r *rollout) drain(t testing.TB, b *backendProcess) int {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, "http://"+r.admin+"/connections/drain", strings.NewReader(fmt.Sprintf(`{"upstream": %q}`, b.addr)))
	if err != nil {
		t.Fatal(err)
	}
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	said := body(t, res)
	var answer struct{ Connections int }
	if err := json.Unmarshal([]byte(said), &answer); err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("drain: got %s: %s", res.Status, said)
	}
	return answer.Connections
}

func (r *rollout) lift(t testing.TB, b *backendProcess) {
	t.Helper()
	if status, said := r.request(t, http.MethodDelete, "/connections/drain?upstream="+url.QueryEscape(b.addr)); status != http.StatusNoContent {
		t.Fatalf("lifting the drain: got %d: %s", status, said)
	}
}

// view returns a backend as its first route sees it.
func (r *rollout) view(t testing.TB, b *backendProcess) upstreamView {
	t.Helper()
	for _, v := range r.views(t) {
		if v.Upstream == b.addr {
			return v
		}
	}
	t.Fatalf("upstreams: got %+v, want %s among them", r.views(t), b.addr)
	return upstreamView{}
}

// finish ends the clients and checks what they and the backends saw.
func (r *rollout) finish(t *testing.T) {
	t.Helper()
	moved, opened := 0.0, 0.0
	for _, line := range grep(r.scrape(t), "caddy_connections_") {
		series, value, _ := strings.Cut(line, " ")
		var n float64
		_, _ = fmt.Sscan(value, &n)
		switch {
		case strings.Contains(series, "migrations_total") && strings.Contains(series, `"moved"`):
			moved += n
		case strings.Contains(series, "migrations_total"):
			t.Errorf("a migration that did not move: %s", line)
		case strings.Contains(series, "opened_total"):
			opened += n
		}
	}
	if moved != float64(r.moves) || opened != float64(len(r.all)) {
		t.Errorf("metrics: got %v moves of %v connections, want %d of %d", moved, opened, r.moves, len(r.all))
	}
	finishTalkers(t, r.all)
	wantWhole(t, r.all, 1+len(r.backends), r.backends...)

	times := make([][][]time.Time, len(r.steps)) // when moves began, by step and route
	for i := range times {
		times[i] = make([][]time.Time, len(r.settings))
	}
	var sum summary
	for _, conns := range backendConns(t, r.backends...) {
		client := senderOf(conns)
		sum.add(&delivery{sent: int(r.all[client].sent.Load()), conns: conns})
		for i, c := range conns {
			if i == len(conns)-1 {
				continue
			}
			if c.code != 1001 {
				t.Errorf("client %d: a backend that was left got close code %d, want 1001: %v", client, c.code, conns)
			}
			step := -1
			for s, at := range r.steps {
				if conns[i+1].opened >= at.UnixNano() {
					step = s
				}
			}
			if step < 0 || r.backends[step].name != c.backend {
				t.Errorf("client %d: it left %s when that was not to be left: %v", client, c.backend, conns)
				continue
			}
			times[step][client%len(r.settings)] = append(times[step][client%len(r.settings)], time.Unix(0, conns[i+1].opened))
		}
	}
	for s := range times {
		for _, began := range times[s] {
			wantPaced(t, began, r.steps[s], r.window)
		}
	}
	t.Logf("%v", &sum)
	if sum.messages < 10*len(r.all) || sum.resumed != r.moves {
		t.Errorf("got %v of %d clients that were to be moved %d times", &sum, len(r.all), r.moves)
	}
}

// wantPaced checks that what happened was spread over a window that did not begin before
// a time: nothing was early and, as far as a busy machine lets this be seen, not all came
// at once.
func wantPaced(t testing.TB, at []time.Time, from time.Time, window time.Duration) {
	t.Helper()
	if len(at) == 0 {
		t.Error("nothing happened: the test is void")
		return
	}
	slices.SortFunc(at, time.Time.Compare)
	n := len(at)
	for i, at := range at {
		if due := time.Duration(float64(window) * float64(i+1) / float64(n)); at.Sub(from) < due-20*time.Millisecond {
			t.Errorf("%d of %d: got it after %v, want not before %v", i+1, n, at.Sub(from), due)
			return
		}
	}
	if took := at[n-1].Sub(at[0]); n >= 8 && took < window/8 {
		t.Errorf("all %d: got them within %v, want them spread over %v", n, took, window)
	}
}
