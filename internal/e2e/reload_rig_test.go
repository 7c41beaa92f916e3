// This file is what tests of reloads share: Caddy with both handlers, clients of both
// that chat all the time, and what a reload must leave as it was.

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// house is a running Caddy with both handlers, and what it counted at the last look.
type house struct {
	*proxy
	globals  string
	doors    []string // addresses for layer4 servers
	counters map[string]float64
}

// openHouse runs Caddy with a site of these routes and layer4 servers.
func openHouse(t testing.TB, globals, site string, tunnels ...string) *house {
	t.Helper()
	h := &house{globals: globals, counters: make(map[string]float64)}
	for range 4 {
		h.doors = append(h.doors, freeAddr(t))
	}
	configProbes.reset()
	passthroughs.mu.Lock()
	passthroughs.all = nil
	passthroughs.mu.Unlock()
	h.proxy = startCaddy(t, "", "respond ok")
	h.reload(t, h.config(site, tunnels...))
	return h
}

// config is a Caddyfile with a site of these routes, and the i-th layer4 server of
// tunnels at the i-th door; there is none for "".
func (h *house) config(site string, tunnels ...string) string {
	var servers strings.Builder
	for i, routes := range tunnels {
		if routes != "" {
			fmt.Fprintf(&servers, "%s {\n%s}\n", h.doors[i], strings.ReplaceAll(routes, "sni_passthrough", "sni_passthrough_probe"))
		}
	}
	globals := "metrics\n" + h.globals
	if servers.Len() > 0 {
		globals += "\nlayer4 {\n" + servers.String() + "}"
	}
	return h.siteConfig(globals, "config_probe\n"+site+"\nrespond ok")
}

// change loads another config of these routes.
func (h *house) change(t testing.TB, site string, tunnels ...string) {
	t.Helper()
	h.reload(t, h.config(site, tunnels...))
}

// chat is a WebSocket route at a path. Settings follow the upstreams.
func chat(path, upstreams, settings string) string {
	return fmt.Sprintf("handle %s {\n websocket_proxy %s {\n %s\n }\n}\n", path, upstreams, settings)
}

// tunnel is a layer4 route.
func tunnel(upstreams, settings string) string {
	return toAll(upstreams + " {\n " + settings + "\n}")
}

// refused wants that a config is refused, and returns why.
func (h *house) refused(t testing.TB, config string) string {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, "http://"+h.admin+"/load", strings.NewReader(config))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "text/caddyfile")
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	said := body(t, res)
	if res.StatusCode == http.StatusOK {
		t.Fatalf("a config was loaded that is to be refused:\n%s", config)
	}
	return said
}

// join lets n clients in at a path, and as many through each door.
func (h *house) join(t testing.TB, n int, path string, doors ...string) (all []*resident) {
	t.Helper()
	for range n {
		if path != "" {
			all = append(all, h.enter(t, path))
		}
		for _, door := range doors {
			all = append(all, h.pass(t, door))
		}
	}
	return all
}

// enter lets a client of a WebSocket route in.
func (h *house) enter(t testing.TB, path string) *resident {
	t.Helper()
	return enterAt(t, h.addr, path)
}

func enterAt(t testing.TB, addr, path string) *resident {
	t.Helper()
	res, c := rawRequest(t, addr, upgradeTo(path, "Host: "+addr))
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%s: got status %d, want 101", path, res.StatusCode)
	}
	return settle(t, &resident{conn: c, speak: c.speak, leave: c.bye})
}

// pass lets a client of a layer4 route in.
func (h *house) pass(t testing.TB, door string) *resident {
	t.Helper()
	c := dialTCP(t, door)
	return settle(t, &resident{conn: c, speak: func(text string) error { return speak(c, text) }, leave: c.CloseWrite})
}

// resident is a client of either handler that sends numbered messages, wants each back,
// once and in order, and has nothing against a pause.
type resident struct {
	conn   net.Conn
	speak  func(text string) error
	leave  func() error
	echoed atomic.Int64
	quit   chan struct{} // closed by finish
	done   chan struct{} // closed by run
	end    error         // valid after done; nil if it left by itself
	ended  time.Time     // valid after done
}

// closing is how a resident was closed by the proxy; the code is 0 for tunnels.
type closing struct{ code uint16 }

func (c closing) Error() string { return fmt.Sprintf("closed by the proxy: code %d", c.code) }

// settle starts a resident and returns when it had its first echo.
func settle(t testing.TB, r *resident) *resident {
	t.Helper()
	r.quit, r.done = make(chan struct{}), make(chan struct{})
	_ = r.conn.SetDeadline(time.Now().Add(60 * time.Second))
	go r.run()
	t.Cleanup(func() { r.conn.Close(); <-r.done })
	if !eventually(20*time.Second, func() bool { return r.echoed.Load() > 0 || r.over() }) || r.over() {
		r.conn.Close()
		<-r.done
		t.Fatalf("a new client gets no echo: %v", r.end)
	}
	return r
}

// run chats until quit or the end of the connection.
func (r *resident) run() {
	defer close(r.done)
	defer func() { r.ended = time.Now() }()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-r.quit:
			r.end = r.leave()
			return
		default:
		}
		if r.end = r.speak(fmt.Sprintf("message %6d", r.echoed.Load())); r.end != nil {
			return
		}
		r.echoed.Add(1)
		<-tick.C
	}
}

// speak sends a message and wants it back. A close frame is answered.
func (c *rawConn) speak(text string) error {
	if _, err := c.Write(frame.Append(nil, ws.OpText, []byte(text), true)); err != nil {
		return err
	}
	h, got, err := c.receiveData()
	if err != nil {
		return err
	}
	if h.OpCode == ws.OpClose && len(got) >= 2 {
		code := uint16(got[0])<<8 | uint16(got[1])
		_, _ = c.Write(frame.AppendClose(nil, code, "", true))
		return closing{code}
	}
	if h.OpCode != ws.OpText || got != text {
		return fmt.Errorf("got %v %q, want an echo of %q", h.OpCode, got, text)
	}
	return nil
}

// receiveData is receive, and answers the pings that come before.
func (c *rawConn) receiveData() (h ws.Header, payload string, err error) {
	for {
		if h, payload, err = c.receive(); err != nil || h.OpCode != ws.OpPing {
			return h, payload, err
		}
		if _, err = c.Write(frame.Append(nil, ws.OpPong, []byte(payload), c.client)); err != nil {
			return h, payload, err
		}
	}
}

// bye closes in good order.
func (c *rawConn) bye() error {
	if _, err := c.Write(frame.AppendClose(nil, 1000, "", true)); err != nil {
		return err
	}
	if code, _, before, err := c.receiveClose(); err != nil || code != 1000 || len(before) > 0 {
		return fmt.Errorf("close: got %d after %q, %w", code, before, err)
	}
	return nil
}

// speak sends bytes and wants them back.
func speak(c *net.TCPConn, text string) error {
	got := make([]byte, len(text))
	_, err := io.WriteString(c, text)
	if err == nil {
		_, err = io.ReadFull(c, got)
	}
	switch timeout, ok := err.(net.Error); {
	case err != nil && !(ok && timeout.Timeout()):
		return closing{}
	case err != nil:
		return err
	case string(got) != text:
		return fmt.Errorf("got %q, want an echo of %q", got, text)
	}
	return nil
}

// wantChatting wants that each resident gets echoes from now on.
func wantChatting(t testing.TB, all ...*resident) {
	t.Helper()
	before := make([]int64, len(all))
	for i, r := range all {
		before[i] = r.echoed.Load()
	}
	for i, r := range all {
		// What was sent before may still be echoed.
		eventually(20*time.Second, func() bool { return r.echoed.Load() > before[i]+1 || r.over() })
		if r.over() {
			t.Errorf("client %d of %d: %v after %d echoes", i, len(all), r.end, r.echoed.Load())
		} else if r.echoed.Load() <= before[i]+1 {
			t.Errorf("client %d of %d: it gets no echo", i, len(all))
		}
	}
}

func (r *resident) over() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// wantClosed wants that residents are closed with a code, spread over a window that did
// not begin before a time. A window of zero says nothing of when.
func wantClosed(t testing.TB, code uint16, from time.Time, window time.Duration, all ...*resident) {
	t.Helper()
	ended := make([]time.Time, 0, len(all))
	for i, r := range all {
		if !eventually(window+20*time.Second, r.over) {
			t.Errorf("client %d of %d is not closed", i, len(all))
			continue
		}
		if r.end != (closing{code}) {
			t.Errorf("client %d of %d: got %v, want it closed with code %d", i, len(all), r.end, code)
		}
		ended = append(ended, r.ended)
	}
	if window > 0 {
		wantPaced(t, ended, from, window)
	}
}

// finish lets residents leave and wants that nothing was wrong.
func finish(t testing.TB, all ...*resident) {
	t.Helper()
	for _, r := range all {
		close(r.quit)
	}
	for i, r := range all {
		<-r.done
		if r.end != nil {
			t.Errorf("client %d of %d, after %d echoes: %v", i, len(all), r.echoed.Load(), r.end)
		}
		if c, ok := r.conn.(*net.TCPConn); ok {
			_, _ = io.Copy(io.Discard, c) // the answer to its FIN
		}
		r.conn.Close()
	}
}

// wantContinuous wants that no counter has fallen or gone since the last look, but those
// of routes that are gone, and that so many connections of each route were opened.
func (h *house) wantContinuous(t testing.TB, opened map[string]int, gone ...string) {
	t.Helper()
	now := make(map[string]float64)
	if !eventually(15*time.Second, func() bool {
		clear(now)
		for _, line := range grep(h.scrape(t), "caddy_connections_") {
			series, value, _ := strings.Cut(line, " ")
			var n float64
			if _, err := fmt.Sscan(value, &n); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			now[series] = n
		}
		return !slices.ContainsFunc(gone, func(name string) bool { return ofRoute(now, name) })
	}) {
		t.Errorf("series of routes %q, which are gone, are still there", gone)
	}
	for series, before := range h.counters {
		name, _, _ := strings.Cut(series, "{")
		counts := slices.ContainsFunc([]string{"_total", "_bucket", "_sum", "_count"}, func(end string) bool { return strings.HasSuffix(name, end) })
		after, there := now[series]
		ended := slices.ContainsFunc(gone, func(name string) bool { return strings.Contains(series, fmt.Sprintf("route=%q", name)) })
		if counts && !ended && (!there || after < before) {
			t.Errorf("%s: got %v (there: %v), want no less than before, %v", series, after, there, before)
		}
	}
	h.counters = now
	total := make(map[string]int)
	for series, n := range now {
		if name, labels, _ := strings.Cut(series, "{"); name == "caddy_connections_opened_total" {
			_, route, _ := strings.Cut(labels, `route="`)
			route, _, _ = strings.Cut(route, `"`)
			total[route] += int(n)
		}
	}
	if fmt.Sprint(total) != fmt.Sprint(opened) { // maps are printed in order
		t.Errorf("connections that were opened: got %v, want %v", total, opened)
	}
}

// ofRoute reports whether there are series of a route.
func ofRoute(series map[string]float64, name string) bool {
	for s := range series {
		if strings.Contains(s, fmt.Sprintf("route=%q", name)) {
			return true
		}
	}
	return false
}

// wantFreed wants that no config is in memory but the running one, which has so many
// sites, WebSocket routes and layer4 routes. Sites answer at their addresses.
func (h *house) wantFreed(t testing.TB, routes, tunnels int, sites ...string) {
	t.Helper()
	for _, site := range append(sites, h.addr) {
		if got := plainStatus(t, site); got != http.StatusOK { // now its handlers are known
			t.Errorf("status of a page: got %d, want 200", got)
		}
	}
	want := fmt.Sprintf("servers %d, tls apps %d, handlers %d, layer4 handlers %d", 1+len(sites), 1+len(sites), routes, tunnels)
	var got string
	if !eventually(20*time.Second, func() bool {
		runtime.GC()
		configProbes.mu.Lock()
		passthroughs.mu.Lock()
		got = fmt.Sprintf("servers %d, tls apps %d, handlers %d, layer4 handlers %d",
			count(configProbes.servers), count(configProbes.tls), count(configProbes.handler), count(passthroughs.all))
		passthroughs.mu.Unlock()
		configProbes.mu.Unlock()
		return got == want
	}) {
		t.Errorf("in memory: got %s, want those of the running config: %s", got, want)
	}
}

// echoes starts n backends of each handler.
func echoes(t testing.TB, n int) (webSockets, bytes []string) {
	t.Helper()
	for range n {
		webSockets, bytes = append(webSockets, rawBackend(t, echoRaw)), append(bytes, echoBackend(t, nil))
	}
	return webSockets, bytes
}
