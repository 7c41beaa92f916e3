// This file tests what metrics and API show of connections that lose their backend,
// are held, and are moved.

package e2e

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// The scripted life of a connection: its backend is killed with messages in hand, it is
// held, resumed, moved, held again and given up. The totals go on across reloads, and
// those of the route go with it.
func TestMetricsOfResumes(t *testing.T) {
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")
	site := func(name, more string) string {
		return fmt.Sprintf("websocket_proxy %s %s {\n name %s\n lb_policy round_robin\n resume_interval 20ms 200ms\n %s\n}", a.addr, b.addr, name, more)
	}
	const globals = "metrics\nconnection_registry {\n orphan_timeout 0s\n}"
	p := startCaddy(t, globals, site("app", ""))
	c := rawDial(t, p.addr, "")
	id := p.connections(t)[0].ID
	on, other := a, b
	if p.connections(t)[0].Upstream == b.addr {
		on, other = b, a
	}
	show := func() (r resumption) {
		t.Helper()
		p.call(t, http.MethodGet, "/connections/"+id, &r)
		return r
	}
	c.send(t, ws.OpText, "acknowledged")
	if !eventually(15*time.Second, func() bool {
		at := backendConns(t, on)[id]
		return show().Buffered == 0 && len(at) == 1 && len(at[0].texts) == 1
	}) {
		t.Fatalf("what was acknowledged is still kept: %+v", show())
	}

	// Three messages are lost with it, two come while there is no backend.
	on.freeze(t)
	for n := range 3 {
		c.send(t, ws.OpText, "lost "+strconv.Itoa(n))
	}
	if !eventually(15*time.Second, func() bool { return p.connections(t)[0].MessagesIn == 4 }) {
		t.Fatalf("got %+v", p.connections(t))
	}
	if got := show(); got.Buffered < 3*int64(len("lost 0")) || got.Resumes != 0 {
		t.Errorf("with messages unacknowledged: got %+v, want bytes buffered", got)
	}
	lost := time.Now()
	kill(t, other, on)
	p.waitState(t, id, "held", "")
	held := show().Buffered
	c.send(t, ws.OpText, "held 0")
	c.send(t, ws.OpText, "held 1")
	if !eventually(15*time.Second, func() bool { return show().Buffered >= held+2*int64(len("held 0")) }) {
		t.Errorf("while held: got %+v, want more than %d bytes buffered", show(), held)
	}
	var list struct{ Connections []resumption }
	if p.call(t, http.MethodGet, "/connections?state=held", &list); len(list.Connections) != 1 || list.Connections[0] != show() {
		t.Errorf("connections that are held: got %+v, want %+v", list.Connections, show())
	}
	if p.call(t, http.MethodGet, "/connections?state=open", &list); len(list.Connections) != 0 {
		t.Errorf("connections that are open: got %+v, want none", list.Connections)
	}
	if s := p.stats(t); s.ByState["held"] != 1 || len(s.ByUpstream) != 0 || s.Total != 1 {
		t.Errorf("stats: got %+v, want one held, on no upstream", s)
	}
	p.wantMetrics(t, map[string]string{
		`caddy_connections_active{kind="websocket",route="app",state="held"}`: "1",
		`caddy_connections_active{kind="websocket",route="app",state="open"}`: "0",
	})
	if got := p.value(t, "caddy_connections_replay_bytes"); got < float64(show().Buffered) {
		t.Errorf("replay_bytes: got %v, want at least the %d of the connection", got, show().Buffered)
	}
	pass(300 * time.Millisecond) // the time held is told apart from none
	on.restart(t)
	p.waitState(t, id, "open", on.addr)
	if got := show(); got.Resumes != 1 || got.Replayed != 3 || got.Dial != on.addr {
		t.Errorf("resumed: got %+v, want one resume, three messages replayed", got)
	}
	p.wantMetrics(t, map[string]string{
		`caddy_connections_resumes_total{result="resumed",route="app"}`: "1",
		`caddy_connections_replayed_messages_total{route="app"}`:        "3",
		`caddy_connections_held_seconds_count{route="app"}`:             "1",
	})
	if sum := p.value(t, `caddy_connections_held_seconds_sum{route="app"}`); sum < 0.3 || sum > time.Since(lost).Seconds() {
		t.Errorf("held_seconds_sum: got %v, want the time it was held", sum)
	}
	// One round trip later all is acknowledged, and the memory given back.
	if !eventually(15*time.Second, func() bool { return show().Buffered == 0 && p.value(t, "caddy_connections_replay_bytes") == 0 }) {
		t.Errorf("resumed: got %+v, replay_bytes %v, want nothing kept", show(), p.value(t, "caddy_connections_replay_bytes"))
	}
	if got := backendConns(t, on)[id]; len(got) != 2 || strings.Join(got[1].texts, ",") != "lost 0,lost 1,lost 2,held 0,held 1" {
		t.Errorf("resumed: got %v", got)
	}

	// A reload in between, and a move.
	other.restart(t)
	p.reload(t, p.siteConfig(globals, site("app", "max_lifetime 1h")))
	if status := p.migrate(t, id); status != http.StatusAccepted {
		t.Fatalf("got %d, want 202", status)
	}
	p.waitState(t, id, "open", other.addr)
	p.wantMetrics(t, map[string]string{
		`caddy_connections_migrations_total{result="moved",route="app"}`: "1",
		`caddy_connections_resumes_total{result="resumed",route="app"}`:  "1",
		`caddy_connections_replayed_messages_total{route="app"}`:         "3",
		`caddy_connections_held_seconds_count{route="app"}`:              "1",
	})
	if got := show(); got.Resumes != 2 || got.Replayed != 3 {
		t.Errorf("moved: got %+v, want two resumes, three replayed", got)
	}

	// It is held for too long.
	p.reload(t, p.siteConfig(globals, site("app", "resume_timeout 500ms")))
	kill(t, a, b)
	if code, _, _, err := c.receiveClose(); err != nil || code != 1013 {
		t.Errorf("close: got %d, %v; want 1013", code, err)
	}
	c.sendClose(t, 1013, "")
	p.waitEmpty(t)
	p.wantMetrics(t, map[string]string{
		`caddy_connections_resumes_total{result="resume_timeout",route="app"}`:                 "1",
		`caddy_connections_resumes_total{result="resumed",route="app"}`:                        "1",
		`caddy_connections_closed_total{kind="websocket",reason="resume_timeout",route="app"}`: "1",
		`caddy_connections_held_seconds_count{route="app"}`:                                    "2",
		`caddy_connections_active{kind="websocket",route="app",state="held"}`:                  "0",
		`caddy_connections_replay_bytes`:                                                       "0",
	})

	problems, err := promlint.New(strings.NewReader(p.ownMetrics(t))).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: got %v, %v", problems, err)
	}
	p.reload(t, p.siteConfig(globals, site("other", "")))
	if !eventually(15*time.Second, func() bool { return !strings.Contains(p.scrape(t), `route="app"`) }) {
		t.Errorf("series of a route that is gone are still there: %q", grep(p.scrape(t), "caddy_connections_"))
	}
}

// value returns the value of a series, 0 if it is not there.
func (p *proxy) value(t testing.TB, series string) float64 {
	t.Helper()
	if lines := grep(p.scrape(t), series+" "); len(lines) > 0 {
		line := lines[0]
		v, err := strconv.ParseFloat(strings.TrimPrefix(line, series+" "), 64)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		return v
	}
	return 0
}

// ownMetrics is what is scraped of the plugin's metrics, with their help and type.
func (p *proxy) ownMetrics(t testing.TB) string {
	t.Helper()
	var own []string
	for line := range strings.SplitSeq(p.scrape(t), "\n") {
		name := strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE ")
		if strings.HasPrefix(name, "caddy_connections_") {
			own = append(own, line)
		}
	}
	return strings.Join(own, "\n") + "\n"
}
