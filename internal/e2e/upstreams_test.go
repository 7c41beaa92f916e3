// This file tests what is told of upstreams: by the admin API, metrics and events.

package e2e

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

// GET /connections/upstreams and the metrics tell of every upstream of every route, in
// the order of the config, in whichever situation it is.
func TestUpstreamsShown(t *testing.T) {
	good, sick, failing := startPatient(t), startPatient(t), startPatient(t)
	sick.answer("/health", answers(response(503, "no")))
	failing.answer("/chat", answers(response(503, "busy")))
	goodURL := "ws://" + good.addr
	const away = "{http.request.header.X-Backend}"
	site := func(to string) string {
		return fmt.Sprintf("handle /chat {\n websocket_proxy %s {\n name chat\n lb_policy first\n fail_duration 1h\n max_fails 2\n health_ws /health\n drain_window 0s\n}\n}\n", to) +
			fmt.Sprintf("handle /named {\n rewrite /chat\n websocket_proxy %s {\n name named\n}\n}\n", away)
	}
	all := sick.addr + " " + failing.addr + " " + goodURL
	p := startCaddy(t, "metrics", site(all))
	p.waitHealth(t, slack, map[string]bool{sick.addr: false})
	want := func(what string, views ...upstreamView) {
		t.Helper()
		var got []upstreamView
		if !eventually(slack, func() bool { got = p.views(t); return slices.Equal(got, views) }) {
			t.Errorf("%s:\n got %+v\nwant %+v", what, got, views)
		}
		metrics := make(map[string]string)
		for _, v := range views {
			labels := fmt.Sprintf(`{route="%s",upstream="%s"}`, v.Route, v.Upstream)
			metrics["caddy_connections_upstream_connections"+labels] = fmt.Sprint(v.Connections)
			metrics["caddy_connections_upstream_healthy"+labels] = map[bool]string{true: "1", false: "0"}[v.Healthy]
		}
		delete(metrics, fmt.Sprintf(`caddy_connections_upstream_healthy{route="named",upstream="%s"}`, away))
		p.wantMetrics(t, metrics)
	}
	row := func(b *patient) upstreamView {
		return upstreamView{Route: "chat", Upstream: b.addr, Dial: b.addr, Healthy: true}
	}
	s, f, g := row(sick), row(failing), row(good)
	s.Healthy, g.Upstream = false, goodURL
	named := upstreamView{Route: "named", Upstream: away, Healthy: true}
	want("at the beginning", s, f, g, named)

	first := rawDial(t, p.addr, "")
	f.Fails, g.Connections = 1, 1
	want("with a failure and a connection", s, f, g, named)
	rawDial(t, p.addr, "")
	f.Fails, f.Healthy, g.Connections = 2, false, 2
	want("with max_fails failures", s, f, g, named)

	res, byName := rawRequest(t, p.addr, upgradeTo("/named", "Host: "+p.addr, "X-Backend: "+good.addr))
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upstream by a placeholder: got %d, want 101", res.StatusCode)
	}
	dialed := named
	dialed.Dial, dialed.Connections = good.addr, 1
	named.Connections = 0
	views := p.views(t)
	if !slices.Contains(views, dialed) {
		t.Errorf("upstream by a placeholder: got %+v, want %+v among them", views, dialed)
	}
	p.wantMetrics(t, map[string]string{`caddy_connections_upstream_connections{route="named",upstream="` + away + `"}`: "1"})
	byName.sendClose(t, 1000, "")
	_, _, _, _ = byName.receiveClose()
	want("when that connection has ended", s, f, g, named)

	drain := func(method, query, body string) {
		t.Helper()
		req, err := http.NewRequest(method, "http://"+p.admin+"/connections/drain"+query, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Close = true
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode >= 300 {
			t.Fatalf("%s drain: %s", method, res.Status)
		}
	}
	drain(http.MethodPost, "", `{"upstream":"`+goodURL+`"}`)
	g.Draining = true
	want("while it is drained", s, f, g, named)
	drain(http.MethodDelete, "?upstream="+goodURL, "")
	g.Draining = false
	want("when that is lifted", s, f, g, named)

	first.sendClose(t, 1000, "")
	_, _, _, _ = first.receiveClose()
	g.Connections = 1
	want("when a connection has ended", s, f, g, named)

	// One that leaves the config is shown for as long as a connection is on it.
	failing.answer("/chat", nil)
	sick.answer("/health", nil)
	p.reload(t, p.siteConfig("metrics", site(goodURL)))
	want("when others have left the config", g, named)
	if !eventually(10*time.Second, func() bool { return !strings.Contains(p.scrape(t), `upstream="`+sick.addr) }) {
		t.Errorf("series of an upstream that is gone are still there")
	}
}

// An upstream that becomes unhealthy or healthy is an event, with its address as
// configured, as reverse_proxy has it. Nothing is told of one that is as it was.
func TestHealthEvents(t *testing.T) {
	a, b := startPatient(t), startPatient(t)
	const globals = "events {\n on healthy note_event\n on unhealthy note_event\n}"
	to := "ws://" + a.addr
	site := "websocket_proxy " + to + " " + b.addr + " {\n health_interval 100ms\n health_ws /health\n}"
	notes.take()
	p := startCaddy(t, globals, site)
	for n := range 2 {
		a.answer("/health", answers(response(503, "no")))
		notes.want(t, "unhealthy http.handlers.websocket_proxy map[host:"+to+"]")
		p.waitHealth(t, slack, map[string]bool{to: false, b.addr: true})
		p.reload(t, p.siteConfig(globals, site+fmt.Sprintf("\nheader X-Config %d", n)))
		a.answer("/health", nil)
		notes.want(t, "healthy http.handlers.websocket_proxy map[host:"+to+"]")
	}
	pass(500 * time.Millisecond)
	if more := notes.take(); len(more) > 0 {
		t.Errorf("more events: %q", more)
	}
}

// An event handler may load another config, and wait until that runs.
func TestReloadByHealthEvent(t *testing.T) {
	sick := startPatient(t)
	sick.answer("/health", answers(response(503, "no")))
	const globals = "events {\n on unhealthy note_event\n}"
	site := "websocket_proxy " + sick.addr + " {\n health_interval 100ms\n health_ws /health\n}"
	p := startCaddy(t, globals, site)
	p.waitHealth(t, slack, map[string]bool{sick.addr: false})
	loaded := make(chan struct{})
	notes.set(func() { p.reload(t, p.siteConfig("", site)); close(loaded) })
	defer notes.set(nil)
	sick.answer("/health", nil)
	p.waitHealth(t, slack, map[string]bool{sick.addr: true})
	sick.answer("/health", answers(response(503, "no")))
	select {
	case <-loaded:
	case <-time.After(30 * time.Second):
		t.Fatal("the config that an event handler loads does not start")
	}
	notes.take()
}

// noteEvent is an event handler that notes what is emitted.
type noteEvent struct{}

// notes are the events of the test that runs.
var notes eventLog

type eventLog struct {
	mu     sync.Mutex
	events []string
	react  func() // what the handler does besides; nil: nothing
}

func init() { caddy.RegisterModule(noteEvent{}) }

func (noteEvent) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.note_event", New: func() caddy.Module { return new(noteEvent) }}
}

func (noteEvent) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	return nil
}

func (noteEvent) Handle(_ context.Context, e caddy.Event) error {
	notes.mu.Lock()
	notes.events = append(notes.events, fmt.Sprintf("%s %s %v", e.Name(), e.Origin().CaddyModule().ID, e.Data))
	react := notes.react
	notes.mu.Unlock()
	if react != nil {
		react()
	}
	return nil
}

// set decides what the handler does besides.
func (l *eventLog) set(react func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.react = react
}

// take returns the events that were noted, and forgets them.
func (l *eventLog) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	events := l.events
	l.events = nil
	return events
}

// want waits for one event.
func (l *eventLog) want(t testing.TB, want string) {
	t.Helper()
	var got []string
	if !eventually(slack, func() bool { got = append(got, l.take()...); return len(got) > 0 }) || len(got) != 1 || got[0] != want {
		t.Errorf("events: got %q, want %q", got, want)
	}
}

// Interface guards
var (
	_ caddyevents.Handler   = (*noteEvent)(nil)
	_ caddyfile.Unmarshaler = (*noteEvent)(nil)
)
