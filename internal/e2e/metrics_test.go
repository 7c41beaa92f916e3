package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// The metrics count a scripted life, go on across a reload, and those of a route
// go with it.
func TestMetrics(t *testing.T) {
	backend := rawBackend(t, echoRaw)
	site := func(name string) string { return "websocket_proxy " + backend + " {\n name " + name + "\n}" }
	globals := "metrics\nconnection_registry {\n orphan_timeout 0s\n}"
	p := startCaddy(t, globals, site("first"))
	c := rawDial(t, p.addr, "")
	c.send(t, ws.OpText, "hello")
	_, _, _ = c.receive()
	p.reload(t, p.siteConfig(globals, site("first")+"\nheader X-Unrelated yes"))
	d := rawDial(t, p.addr, "")
	p.wantMetrics(t, map[string]string{
		`caddy_connections_active{kind="websocket",route="first",state="open"}`:        "2",
		`caddy_connections_opened_total{kind="websocket",route="first"}`:               "2",
		`caddy_connections_bytes_total{direction="in",kind="websocket",route="first"}`: "5",
		`caddy_connections_messages_total{direction="out",route="first"}`:              "1",
	})
	c.sendClose(t, 1000, "")
	_, _, _, _ = c.receiveClose()
	p.wantMetrics(t, map[string]string{
		`caddy_connections_active{kind="websocket",route="first",state="open"}`:                 "1",
		`caddy_connections_closed_total{kind="websocket",reason="client_closed",route="first"}`: "1",
		`caddy_connections_duration_seconds_count{kind="websocket",route="first"}`:              "1",
	})
	p.reload(t, p.siteConfig(globals, site("second")))
	if code, _, _, err := d.receiveClose(); err != nil || code != 1001 {
		t.Errorf("close of a route that is gone: got %d, %v", code, err)
	}
	d.sendClose(t, 1001, "")
	p.waitEmpty(t)
	if !eventually(15*time.Second, func() bool { return !strings.Contains(p.scrape(t), `route="first"`) }) {
		t.Error("series of a route that is gone are still there")
	}
}

func (p *proxy) scrape(t testing.TB) string {
	t.Helper()
	_, body := p.request(t, http.MethodGet, "/metrics")
	return string(body)
}

// wantMetrics waits until the series have these values.
func (p *proxy) wantMetrics(t testing.TB, want map[string]string) {
	t.Helper()
	var missing []string
	if !eventually(15*time.Second, func() bool {
		missing = nil
		got := p.scrape(t)
		for series, value := range want {
			if !strings.Contains(got, fmt.Sprintf("%s %s\n", series, value)) {
				missing = append(missing, series+" "+value)
			}
		}
		return len(missing) == 0
	}) {
		t.Errorf("metrics lack %q; they have\n%s", missing, strings.Join(grep(p.scrape(t), "caddy_connections_"), "\n"))
	}
}

func grep(text, prefix string) (lines []string) {
	for line := range strings.SplitSeq(text, "\n") {
		if strings.HasPrefix(line, prefix) {
			lines = append(lines, line)
		}
	}
	return lines
}
