// This file replaces upstreams by reloads, under clients that chat all the time.

package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
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
	window := long(2*time.Second, 10*time.Second)
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
	if !eventually(window+2*time.Second, func() bool {
		now = p.stats(t)
		return on(now, blue) == len(all) && now.ByState["open"] == len(all)
	}) {
		t.Errorf("connections 2s after the window: got %v on %v, want all %d open on the new upstreams", now.ByState, now.ByUpstream, len(all))
	}
	t.Logf("reload took %v, all had moved %v later: %v", loaded.Sub(asked), time.Since(loaded), now.ByUpstream)
	for _, b := range blue { // each route balances its own
		if n := now.ByUpstream[b.addr]; n < len(all)/3-2*len(settings) || n > len(all)/3+2*len(settings) {
			t.Errorf("connections of the new upstreams: got %v, want about as many on each", now.ByUpstream)
			break
		}
	}
	pass(300 * time.Millisecond)
	moved := make(map[string]string)
	for i := range settings {
		moved[fmt.Sprintf(`caddy_connections_migrations_total{result="moved",route="route%d"}`, i)] = fmt.Sprint(clients)
	}
	p.wantMetrics(t, moved)
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
	if sum.messages < 20*len(all) {
		t.Errorf("got %d messages of %d clients: the test is void", sum.messages, len(all))
	}
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
	slack := long(500*time.Millisecond, 1500*time.Millisecond) // of a busy machine
	n := len(began)
	var worst time.Duration
	for i, at := range began {
		due := time.Duration(float64(window) * float64(i+1) / float64(n))
		early, late := from.Add(due).Sub(at), at.Sub(to.Add(due))
		worst = max(worst, late)
		if early > 50*time.Millisecond || late > slack {
			t.Errorf("move %d of %d: it began %v after the reload, want it after %v", i+1, n, at.Sub(to), due)
			break
		}
	}
	// No burst: within a tenth of the window not more than four tenths' share.
	for i, j := 0, 0; i < n; i++ {
		for began[i].Sub(began[j]) > window/10 {
			j++
		}
		if i-j+1 > 4*n/10+1 {
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

// talker is a client that sends numbered messages without waiting for their echoes,
// and wants each echo once and in order.
type talker struct {
	id      int
	ctx     context.Context
	conn    *websocket.Conn
	quiet   bool // it wants no echoes
	sent    atomic.Int64
	echoed  atomic.Int64
	quit    chan struct{} // closed by finish
	sending chan struct{} // closed by send
	closing atomic.Bool   // it ends as finish wants
	over    chan struct{} // closed by read
	fault   string        // valid after over
	end     ending        // valid after over; zero if finish closed it
}

// startTalkers connects clients to backends that echo.
func startTalkers(t testing.TB, p *proxy, n int) []*talker {
	t.Helper()
	all := make([]*talker, n)
	for i := range n {
		all[i] = dialTalker(t, p, i, "/?echo=1")
	}
	for _, k := range all {
		k.start()
	}
	return all
}

// startTalker connects a client. Without echo in the target it wants none.
func startTalker(t testing.TB, p *proxy, id int, target string) *talker {
	t.Helper()
	k := dialTalker(t, p, id, target)
	k.start()
	return k
}

// dialTalker connects a client that does not talk before it is started.
func dialTalker(t testing.TB, p *proxy, id int, target string) *talker {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), long(60*time.Second, 150*time.Second))
	t.Cleanup(cancel)
	conn, _, err := websocket.Dial(ctx, "ws://"+p.addr+target, nil)
	if err != nil {
		t.Fatalf("client %d: %v", id, err)
	}
	k := &talker{
		id: id, ctx: ctx, conn: conn, quiet: !strings.Contains(target, "echo"),
		quit: make(chan struct{}), sending: make(chan struct{}), over: make(chan struct{}),
	}
	t.Cleanup(func() { _ = k.conn.CloseNow(); <-k.over })
	go k.read()
	return k
}

func (k *talker) start() { go k.send() }

// send owns writing: a message every 20 to 50 ms. It ends with the connection, or by
// quit.
func (k *talker) send() {
	defer close(k.sending)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-k.quit:
			return
		case <-k.over:
			return
		case <-timer.C:
		}
		if k.conn.Write(k.ctx, websocket.MessageText, []byte(numbered(k.id, int(k.sent.Load())))) != nil {
			return
		}
		k.sent.Add(1)
		timer.Reset(20*time.Millisecond + rand.N(30*time.Millisecond))
	}
}

// read owns reading. It ends with the connection or the test.
func (k *talker) read() {
	defer close(k.over)
	for {
		m, err := readCoder(k.ctx, k.conn)
		if err != nil {
			if !k.closing.Load() {
				k.end = coderEnding(err)
			}
			return
		}
		n := int(k.echoed.Load())
		if m.kind != "text" || string(m.data) != numbered(k.id, n) {
			k.fault = fmt.Sprintf("echo %d: got %s %.40q, want %.40q", n, m.kind, m.data, numbered(k.id, n))
			return
		}
		k.echoed.Add(1)
	}
}

// finishTalkers stops them, waits for all echoes, and closes in good order.
func finishTalkers(t testing.TB, all []*talker) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var each sync.WaitGroup
	for _, k := range all {
		each.Go(func() {
			if !k.finish(ctx) {
				t.Errorf("client %d: got %d echoes of %d messages", k.id, k.echoed.Load(), k.sent.Load())
			}
		})
	}
	each.Wait()
}

// finish reports whether all echoes have come.
func (k *talker) finish(ctx context.Context) bool {
	close(k.quit)
	<-k.sending
	came := eventually(10*time.Second, func() bool {
		select {
		case <-k.over:
			return true
		default:
			return k.quiet || k.echoed.Load() == k.sent.Load()
		}
	})
	// Once a pong has come, it is read that reads the answer to the close frame.
	if k.conn.Ping(ctx) == nil {
		k.closing.Store(true)
		_ = k.conn.Close(websocket.StatusNormalClosure, "")
	}
	select {
	case <-k.over:
	case <-ctx.Done():
		_ = k.conn.CloseNow()
		<-k.over
	}
	return came && (k.quiet || k.echoed.Load() == k.sent.Load())
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
	p.waitOn(t, 3*time.Second, map[string]int{b.addr: len(all)})
	finishTalkers(t, all)
	var last time.Duration
	for _, r := range b.records(t) {
		if r.Event == "open" {
			last = max(last, time.Unix(0, r.Time).Sub(loaded))
		}
	}
	if last > time.Second {
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

// wantWhole checks that backends got each message of clients that have finished, once
// and in order, over at most so many connections each.
func wantWhole(t testing.TB, all []*talker, most int, backends ...*backendProcess) {
	t.Helper()
	of := make(map[int][]*backendConn)
	for _, conns := range backendConns(t, backends...) {
		of[senderOf(conns)] = conns
	}
	for _, k := range all {
		del := &delivery{client: k.id, sent: int(k.sent.Load()), ended: k.end, conns: of[k.id]}
		for _, fault := range del.faults(promise{}, 1001) {
			t.Error(fault)
		}
		if k.fault != "" {
			t.Errorf("client %d: %s", k.id, k.fault)
		}
		if len(del.conns) > most {
			t.Errorf("client %d: got %d connections to backends, want at most %d: %v", k.id, len(del.conns), most, del.conns)
		}
	}
}

// A reload that brings an upstream back lifts the moves that are still planned. Those
// who have moved stay where they are.
func TestReloadBringsUpstreamBack(t *testing.T) {
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")
	site := func(window string, to ...*backendProcess) string {
		s := "websocket_proxy {\n drain_window " + window + "\n to"
		for _, to := range to {
			s += " " + to.addr
		}
		return s + "\n}"
	}
	const window = "2s"
	p := startCaddy(t, "", site(window, a))
	all := startTalkers(t, p, 40)
	p.reload(t, p.siteConfig("", site(window, b)))
	if !eventually(5*time.Second, func() bool { return p.stats(t).ByUpstream[b.addr] >= 10 }) {
		t.Errorf("nobody is moved: got %v", p.stats(t).ByUpstream)
	}
	p.reload(t, p.siteConfig("", site(window, a, b)))
	pass(500 * time.Millisecond) // those under way arrive
	before := p.stats(t).ByUpstream
	pass(2500 * time.Millisecond)
	if after := p.stats(t).ByUpstream; !maps.Equal(before, after) || after[a.addr] < 5 || after[b.addr] < 10 {
		t.Errorf("connections: got %v after the upstream has come back, later %v; want the same, on both", before, after)
	}
	// The plan for those who go is a new one.
	p.reload(t, p.siteConfig("", site("0s", b)))
	p.waitOn(t, 3*time.Second, map[string]int{b.addr: len(all)})
	finishTalkers(t, all)
	wantWhole(t, all, 2, a, b)
}

// A reload that fails, early or late, moves nobody, and nobody then either when
// another one keeps the upstreams.
func TestReloadThatFailsMovesNobody(t *testing.T) {
	a, b := startBackend(t, "coder", "a"), startBackend(t, "gorilla", "b")
	site := func(to *backendProcess) string {
		return fmt.Sprintf("websocket_proxy %s {\n name app\n drain_window 0s\n}", to.addr)
	}
	p := startCaddy(t, "", site(a))
	all := startTalkers(t, p, 10)
	load := func(config string) int {
		req, err := http.NewRequest(http.MethodPost, "http://"+p.admin+"/load", strings.NewReader(config))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "text/caddyfile")
		req.Close = true // a load restarts the admin endpoint
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res.StatusCode
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	// Apps are started in random order: this fails before and after the registry's.
	late := fmt.Sprintf("http://%s {\n bind 127.0.0.1\n respond taken\n}\n", taken.Addr())
	for n := range 6 {
		for name, config := range map[string]string{
			"no Caddyfile":   p.siteConfig("", site(b)) + "{",
			"no such value":  p.siteConfig("", strings.Replace(site(b), "drain_window 0s", "drain_window 0s\n replay none", 1)),
			"port is taken":  p.siteConfig("", site(b)) + late,
			"other route":    p.siteConfig("", strings.Replace(site(b), "app", "other", 1)) + late,
			"no such module": p.siteConfig("", site(b)+"\n no_such_directive"),
		} {
			if status := load(config); status == http.StatusOK {
				t.Fatalf("%s: the bad config was loaded", name)
			}
		}
		if n%3 == 2 {
			p.reload(t, p.siteConfig("", site(a)+"\n# "+strings.Repeat("x", n)))
		}
	}
	pass(500 * time.Millisecond)
	p.waitOn(t, time.Second, map[string]int{a.addr: len(all)})
	if got := backendConns(t, b); len(got) > 0 {
		t.Errorf("connections to an upstream of a failed config: got %v", got)
	}
	finishTalkers(t, all)
	wantWhole(t, all, 1, a)
}

// Configs are freed although their connections have moved, or are yet to move, under
// the ones that followed: plain and over TLS, and with a policy of Caddy's own.
func TestMovesKeepNoConfigInMemory(t *testing.T) {
	const clients, reloads = 40, 8
	p := startCaddy(t, "", "respond ok") // the real config follows
	secure := freeAddr(t)
	_, securePort, _ := net.SplitHostPort(secure)
	backends := []string{rawBackend(t, echoRaw), rawBackend(t, echoRaw), rawBackend(t, echoRaw)}
	config := func(n int) string {
		site := fmt.Sprintf("config_probe\nheader X-Generation %d\nwebsocket_proxy %s %s {\n drain_window 100ms\n lb_policy round_robin\n}",
			n, backends[n%3], backends[(n+1)%3])
		return p.siteConfig("metrics\nskip_install_trust", "log {\n output discard\n}\n"+site) +
			fmt.Sprintf("https://localhost:%s {\n tls internal\n %s\n}\n", securePort, site)
	}
	// Caddy itself keeps the config under which it made its certificates.
	p.reload(t, config(0))
	insecure := &tls.Config{ServerName: "localhost", InsecureSkipVerify: true} //nolint:gosec // the CA was made a moment ago
	served := func() {
		t.Helper()
		if !eventually(20*time.Second, func() bool {
			conn, err := tls.Dial("tcp", secure, insecure)
			if err == nil {
				conn.Close()
			}
			return err == nil
		}) {
			t.Fatal("no TLS handshake succeeds")
		}
	}
	served() // a certificate is there
	configProbes.reset()
	p.reload(t, config(1))
	served() // what the old listener had accepted it may have reset
	var chatters []*chatter
	for i := range clients {
		if i%2 == 0 {
			chatters = append(chatters, startChatter(t, p.addr, nil))
		} else {
			chatters = append(chatters, startChatter(t, secure, insecure))
		}
	}
	for n := range reloads {
		p.reload(t, config(n+2))
		pass(150 * time.Millisecond)
	}
	up := map[int]bool{(reloads + 1) % 3: true, (reloads + 2) % 3: true}
	if !eventually(10*time.Second, func() bool {
		now, on := p.stats(t), 0
		for i := range up {
			on += now.ByUpstream[backends[i]]
		}
		return on == clients && now.ByState["open"] == clients
	}) {
		t.Errorf("connections: got %+v, want all on the latest upstreams", p.stats(t))
	}
	var alive int
	if !eventually(20*time.Second, func() bool { runtime.GC(); alive = configProbes.alive(); return alive <= configProbes.perConfig() }) {
		t.Errorf("objects of configs that are still in memory: got %d, want the %d of the running one: %s",
			alive, configProbes.perConfig(), configProbes.describe())
	}
	resumes := 0
	for _, c := range p.resumed(t) {
		resumes += c.Resumes
	}
	for _, c := range chatters {
		c.stop()
		if err := c.err; err != nil {
			t.Errorf("client: %v", err)
		}
	}
	if resumes < clients*reloads/3 {
		t.Errorf("moves: got %d of %d connections over %d reloads, want more for the test to mean something", resumes, clients, reloads)
	}
}

// resumption is what the admin API shows of it.
type resumption struct {
	ID, State, Upstream, Dial string
	Resumes, Replayed         int
	Buffered                  int64 `json:"buffered_bytes"`
}

func (p *proxy) resumed(t testing.TB) []resumption {
	t.Helper()
	var list struct{ Connections []resumption }
	p.call(t, http.MethodGet, "/connections?limit=1000", &list)
	return list.Connections
}
