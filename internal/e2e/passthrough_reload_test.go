// This file tests that tunnels take no harm from reloads: with traffic on them, and from
// reloads that fail.

package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// babbler is a client that sends bytes of all sizes, and wants all of them back.
type babbler struct {
	conn *net.TCPConn
	sent hash.Hash
	got  hash.Hash
	size int64
	back atomic.Int64
	quit chan struct{} // closed by stop
	said chan error    // 1: what speak, which may be done first, has to say
	done chan error    // likewise listen

	reloaded int64 // what back was at the last reload
}

func startBabbler(t testing.TB, addr string, seed uint64) *babbler {
	t.Helper()
	b := &babbler{
		conn: dialTCP(t, addr), sent: sha256.New(), got: sha256.New(),
		quit: make(chan struct{}), said: make(chan error, 1), done: make(chan error, 1),
	}
	_ = b.conn.SetDeadline(time.Now().Add(2 * time.Minute))
	go b.speak(rand.New(rand.NewPCG(seed, 1)))
	go b.listen()
	return b
}

// speak sends until it is to quit, and then the end.
func (b *babbler) speak(random *rand.Rand) {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	words := make([]byte, 32<<10)
	for i := range words {
		words[i] = byte(random.Uint32())
	}
	for {
		from := random.IntN(len(words))
		part := words[from : from+1+random.IntN(len(words)-from)/4]
		if _, err := b.conn.Write(part); err != nil {
			b.said <- err
			return
		}
		b.sent.Write(part)
		b.size += int64(len(part))
		select {
		case <-ticker.C:
		case <-b.quit:
			b.said <- b.conn.CloseWrite()
			return
		}
	}
}

// listen reads until the end.
func (b *babbler) listen() {
	_, err := io.Copy(io.MultiWriter(b.got, b), struct{ io.Reader }{b.conn})
	b.done <- err
}

// Write counts what has come back.
func (b *babbler) Write(p []byte) (int, error) {
	b.back.Add(int64(len(p)))
	return len(p), nil
}

// stop ends the client and returns how many bytes were echoed.
func (b *babbler) stop(t testing.TB) int64 {
	t.Helper()
	close(b.quit)
	if err := <-b.said; err != nil {
		t.Errorf("client: sending: %v", err)
	}
	if err := <-b.done; err != nil {
		t.Errorf("client: reading: %v", err)
	}
	if got := b.back.Load(); got != b.size || !bytes.Equal(b.sent.Sum(nil), b.got.Sum(nil)) {
		t.Errorf("client: got %d bytes back, want the %d that it sent", got, b.size)
	}
	b.conn.Close()
	return b.size
}

// Tunnels under traffic lose no byte over reloads that change their settings, and the old
// configs are gone from memory while they live on.
func TestPassthroughReloadUnderTraffic(t *testing.T) {
	const clients, reloads = 200, 10
	backend := echoBackend(t, nil)
	addr := freeAddr(t)
	config := func(n int) string {
		settings := fmt.Sprintf("%s {\n inactivity_grace %dm\n tcp_keepalive %ds\n log\n}", backend, n+1, n+30)
		return layer4Servers("", layer4Server{addr, strings.ReplaceAll(toAll(settings), "sni_passthrough", "sni_passthrough_probe")})
	}
	p := startCaddy(t, config(0), "respond ok")
	var all []*babbler
	for i := range clients {
		all = append(all, startBabbler(t, addr, uint64(i)))
	}
	for n := range reloads {
		p.reload(t, p.siteConfig(config(n+1), "respond ok"))
		for _, b := range all {
			b.reloaded = b.back.Load()
		}
		quiet := func(b *babbler) bool { return b.back.Load() == b.reloaded }
		if !eventually(20*time.Second, func() bool { return !slices.ContainsFunc(all, quiet) }) {
			t.Fatalf("reload %d: client %d gets nothing back", n, slices.IndexFunc(all, quiet))
		}
	}
	if got := p.stats(t); got.ByState["open"] != clients || got.ByRoute[addr+"#1"] != clients {
		t.Errorf("connections: got %+v, want %d on one route", got, clients)
	}
	alive := 0
	if !eventually(20*time.Second, func() bool {
		runtime.GC()
		passthroughs.mu.Lock()
		defer passthroughs.mu.Unlock()
		alive = count(passthroughs.all)
		return alive == 1
	}) {
		t.Errorf("handlers in memory: got %d, want that of the running config", alive)
	}
	var bytes int64
	for _, b := range all {
		bytes += b.stop(t)
	}
	t.Logf("%d bytes echoed over %d reloads", bytes, reloads)
}

// proxySockets returns the descriptors of this process that are Caddy's side of the
// connections between two addresses, one of which may be of a port only.
func proxySockets(t testing.TB, is func(local, remote string) bool) (fds []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		fd, _ := strconv.Atoi(e.Name())
		local, _ := syscall.Getsockname(fd)
		remote, _ := syscall.Getpeername(fd)
		l, ok := local.(*syscall.SockaddrInet4)
		if !ok {
			continue
		}
		if r, ok := remote.(*syscall.SockaddrInet4); ok && is(fmt.Sprint("127.0.0.1:", l.Port), fmt.Sprint("127.0.0.1:", r.Port)) {
			fds = append(fds, fd)
		}
	}
	return fds
}

// What a reload says of keep-alive reaches the sockets of live tunnels, on both legs.
func TestPassthroughChangedKeepAlive(t *testing.T) {
	backend := echoBackend(t, nil)
	route := func(settings string) string { return toAll(backend + " {\n " + settings + "\n}") }
	p, addr := startLayer4(t, "", route(""))
	c := dialTCP(t, addr)
	wantEcho(t, c, "hello")
	legs := append(proxySockets(t, func(local, remote string) bool { return local == addr && remote == c.LocalAddr().String() }),
		proxySockets(t, func(_, remote string) bool { return remote == backend })...)
	if len(legs) != 2 {
		t.Fatalf("sockets: got %d, want both legs", len(legs))
	}
	const userTimeout = 18 // TCP_USER_TIMEOUT, which package syscall does not have
	options := [...]struct{ level, option int }{
		{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL},
		{syscall.IPPROTO_TCP, syscall.TCP_KEEPCNT},
		{syscall.IPPROTO_TCP, userTimeout},
	}
	want := func(settings string, want [len(options)]int) {
		t.Helper()
		var got [2][len(options)]int
		if !eventually(10*time.Second, func() bool {
			for i, fd := range legs {
				for j, o := range options {
					got[i][j], _ = syscall.GetsockoptInt(fd, o.level, o.option)
				}
				if want[0] == 0 { // the rest does not matter then
					copy(got[i][1:4], want[1:4])
				}
			}
			return got[0] == want && got[1] == want
		}) {
			t.Errorf("%q: got %v, want %v on both legs", settings, got, want)
		}
	}
	want("", [...]int{1, 60, 15, 4, 0})
	for _, tt := range []struct {
		settings string
		want     [len(options)]int
	}{
		{"tcp_keepalive 7s 3s 5\n tcp_user_timeout 9s", [...]int{1, 7, 3, 5, 9000}},
		{"tcp_keepalive off", [...]int{0, 7, 3, 5, 0}},
		{"tcp_keepalive 8s", [...]int{1, 8, 15, 4, 0}},
		{"", [...]int{1, 60, 15, 4, 0}},
	} {
		p.reload(t, p.layer4Config(addr, "", route(tt.settings)))
		want(tt.settings, tt.want)
	}
	wantEcho(t, c, "still")
	c.Close()
}

// startHook is an app that does what a test says when it starts, after some of the other
// apps and before the rest.
type startHook struct{}

// onStart is what it does; the test sets it.
var onStart func() error

func init() { caddy.RegisterModule(startHook{}) }

func (startHook) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "start_hook", New: func() caddy.Module { return new(startHook) }}
}

func (startHook) Start() error { return onStart() }
func (startHook) Stop() error  { return nil }

// withHook adapts a Caddyfile and adds the app.
func withHook(t testing.TB, caddyfile string) []byte {
	t.Helper()
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), nil)
	if err != nil {
		t.Fatalf("adapting: %v\n%s", err, caddyfile)
	}
	return bytes.Replace(config, []byte(`"apps":{`), []byte(`"apps":{"start_hook":{},`), 1)
}

// A connection that comes by the new config, while the old one still serves and does not
// know its upstream, stays.
func TestPassthroughDuringReload(t *testing.T) {
	const globals = "connection_registry {\n orphan_timeout 0\n}"
	upstreams := echoBackend(t, nil)
	route := func() string { return toAll(upstreams + " {\n name tunnels\n lb_policy first\n}") }
	p, _ := startLayer4(t, globals, route())
	var conns []net.Conn
	for range 40 { // apps start in any order: half of them are too early
		upstreams = echoBackend(t, nil) + " " + upstreams
		addr := freeAddr(t)
		var during net.Conn
		onStart = func() (err error) {
			if reachable(addr) {
				during, err = net.Dial("tcp", addr)
			}
			if during != nil {
				_ = during.SetDeadline(time.Now().Add(30 * time.Second))
				_, _ = io.WriteString(during, "hello")
				_, err = io.ReadFull(during, make([]byte, 5))
			}
			return err
		}
		if status, said := p.submit(t, "application/json", withHook(t, p.layer4Config(addr, globals, route()))); status != http.StatusOK {
			t.Fatalf("load: got %d %s", status, said)
		}
		if during != nil {
			conns = append(conns, during)
		}
		if len(conns) == 5 {
			break
		}
	}
	if len(conns) == 0 {
		t.Error("no connection came while a config started")
	}
	for _, c := range conns {
		wantEcho(t, c, "still")
		c.Close()
	}
}

// wantLoadFails wants that a Caddyfile is not loaded, and that it was one of its apps that
// could not start if starting is to fail.
func (p *proxy) wantLoadFails(t testing.TB, caddyfile string, starting bool) {
	t.Helper()
	onStart = func() error { return errors.New("this app cannot start") }
	status, said := p.submit(t, "application/json", withHook(t, caddyfile))
	if status != http.StatusBadRequest || starting && !strings.Contains(said, "cannot start") {
		t.Fatalf("load: got status %d, %s; want that it fails", status, said)
	}
}

// A reload that fails leaves tunnels alone, though its settings would have ended them all,
// at once: whether it fails before it starts or, in which order ever its apps do, while it
// starts.
func TestPassthroughFailedReload(t *testing.T) {
	backend, other := echoBackend(t, nil), echoBackend(t, nil)
	route := func(to, settings string) string { return toAll(to + " {\n name tunnels\n " + settings + "\n}") }
	const fatal = "keep_alive_treatment standard\n inactivity_timeout 1ms\n inactivity_grace 0\n max_lifetime 1ms\n max_connections 1"
	const now = "connection_registry {\n orphan_timeout 0\n}"
	p, addr := startLayer4(t, now, route(backend, ""))
	conns, _ := pacedConns(t, addr, 5)
	for _, bad := range []struct {
		name, globals string
		starting      bool
	}{
		{"provisioning", layer4Servers(now, layer4Server{addr, route(backend, fatal)}, layer4Server{freeAddr(t), route(backend, "")}), false},
		{"settings", layer4Servers(now, layer4Server{addr, route(backend, fatal)}), true},
		{"upstream", layer4Servers(now, layer4Server{addr, route(other, "")}), true},
		{"no route", layer4Servers(now, layer4Server{addr, toAll(other)}), true},
		{"nothing", "", true},
	} {
		for range 8 { // apps start in any order
			p.wantLoadFails(t, p.siteConfig(bad.globals, "respond bad"), bad.starting)
		}
		for i, c := range conns {
			if _, err := io.WriteString(c, "still"); err != nil {
				t.Fatalf("%s: client %d: %v", bad.name, i, err)
			}
			if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
				t.Fatalf("%s: client %d: %v: %+v", bad.name, i, err, p.stats(t))
			}
		}
		next := dialTCP(t, addr)
		wantEcho(t, next, "hello")
		conns = append(conns, next)
	}
	if got := p.stats(t).ByUpstream; got[backend] != len(conns) || len(got) != 1 {
		t.Errorf("upstreams: got %v, want all %d at %s", got, len(conns), backend)
	}
	for _, c := range conns {
		c.Close()
	}
}
