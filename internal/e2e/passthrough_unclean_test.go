// This file tests crowds of passthrough clients: those that leave in unclean ways, and
// those that are closed all at once.

package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// helloFor is a ClientHello that asks for a name.
func helloFor(t testing.TB, name string) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	go func() { // ends when the other end is closed
		_ = tls.Client(theirs, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake() //nolint:gosec // nobody is there
		theirs.Close()
	}()
	defer ours.Close()
	hello := make([]byte, 5)
	if _, err := io.ReadFull(ours, hello); err != nil {
		t.Fatal(err)
	}
	body := make([]byte, int(hello[3])<<8|int(hello[4]))
	if _, err := io.ReadFull(ours, body); err != nil {
		t.Fatal(err)
	}
	return append(hello, body...)
}

// uncleanWorld is what unclean clients may connect to.
type uncleanWorld struct {
	site, plain     string // addresses
	secure, patient string // likewise; the latter has a longer matching_timeout
	ca              *testca.Authority
	hello, mute     []byte // ClientHellos for the two names
}

// uncleanWays are how clients live, and leave: most of them at once.
var uncleanWays = []func(w *uncleanWorld, random *rand.Rand) error{
	// Nothing is said, or half a ClientHello.
	func(w *uncleanWorld, _ *rand.Rand) error { return w.leave(w.secure, nil, false) },
	func(w *uncleanWorld, _ *rand.Rand) error { return w.leave(w.secure, nil, true) },
	func(w *uncleanWorld, random *rand.Rand) error { return w.leave(w.secure, half(w.hello, random), false) },
	func(w *uncleanWorld, random *rand.Rand) error { return w.leave(w.secure, half(w.hello, random), true) },
	// … and then the client waits: matching_timeout ends it.
	func(w *uncleanWorld, _ *rand.Rand) error { return w.wait(w.secure, nil) },
	func(w *uncleanWorld, random *rand.Rand) error { return w.wait(w.secure, half(w.hello, random)) },
	// A whole ClientHello, and silence, which inactivity_timeout ends.
	func(w *uncleanWorld, _ *rand.Rand) error { return w.wait(w.secure, w.mute) },
	// A tunnel stands, or is about to.
	func(w *uncleanWorld, _ *rand.Rand) error { return w.leave(w.secure, w.hello, false) },
	func(w *uncleanWorld, _ *rand.Rand) error { return w.leave(w.secure, w.hello, true) },
	func(w *uncleanWorld, _ *rand.Rand) error { return w.leave(w.plain, nil, false) },
	func(w *uncleanWorld, _ *rand.Rand) error { return w.leave(w.plain, []byte("hello"), true) },
	func(w *uncleanWorld, _ *rand.Rand) error { return w.leave(w.plain, make([]byte, 200_000), false) },
	func(w *uncleanWorld, _ *rand.Rand) error { return w.leave(w.plain, make([]byte, 200_000), true) },
	// Well-behaved ones, which must not notice the others.
	func(w *uncleanWorld, _ *rand.Rand) error { return w.behave(w.plain, false) },
	func(w *uncleanWorld, _ *rand.Rand) error { return w.behave(w.patient, true) },
}

func half(hello []byte, random *rand.Rand) []byte { return hello[:1+random.IntN(len(hello)-1)] }

func (*uncleanWorld) dial(addr string) (*net.TCPConn, error) {
	conn, err := net.DialTimeout("tcp", addr, 20*time.Second)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(40 * time.Second))
	return conn.(*net.TCPConn), nil
}

// leave says something and breaks off, by a FIN or a reset.
func (w *uncleanWorld) leave(addr string, says []byte, reset bool) error {
	conn, err := w.dial(addr)
	if err != nil {
		return err
	}
	_, _ = conn.Write(says)
	if reset {
		_ = conn.SetLinger(0)
	}
	return conn.Close()
}

// wait says something and waits until it is closed.
func (w *uncleanWorld) wait(addr string, says []byte) error {
	conn, err := w.dial(addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, _ = conn.Write(says)
	if _, err := io.Copy(io.Discard, struct{ io.Reader }{conn}); errors.Is(err, os.ErrDeadlineExceeded) {
		return errors.New("nobody closes a client that is silent")
	}
	return nil
}

// behave has bytes echoed and ends in good order.
func (w *uncleanWorld) behave(addr string, secure bool) error {
	raw, err := w.dial(addr)
	if err != nil {
		return err
	}
	defer raw.Close()
	var conn interface {
		net.Conn
		CloseWrite() error
	} = raw
	if secure {
		conn = tls.Client(raw, &tls.Config{ServerName: "one.test", RootCAs: w.ca.Pool()})
	}
	for range 3 {
		if _, err := io.WriteString(conn, "hello"); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
			return err
		}
	}
	if err := conn.CloseWrite(); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, struct{ io.Reader }{conn})
	return err
}

// C25, C27, C39: 1000 clients at once that leave in every unclean way, among TLS, other
// bytes and WebSockets, leave nothing, and every slot can be taken again.
func TestPassthroughUncleanClients(t *testing.T) {
	const clients, limit = 1000, 500
	ca := testca.New(t)
	secure := echoBackend(t, &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "one.test", "one.test", "mute.test")}})
	w := &uncleanWorld{secure: freeAddr(t), patient: freeAddr(t), plain: freeAddr(t), ca: ca, hello: helloFor(t, "one.test"), mute: helloFor(t, "mute.test")}
	limits := func(name string) string {
		return fmt.Sprintf("name unclean-%s\n max_connections %d\n max_connections_per_ip %d", name, limit, limit)
	}
	toOne := toSNI("one.test", secure+" {\n "+limits("tls")+"\n}")
	p := startCaddy(t, layer4Servers("metrics",
		layer4Server{w.patient, "matching_timeout 30s\n" + toOne},
		layer4Server{w.secure, "matching_timeout 1s\n" + toOne +
			toSNI("mute.test", secure+" {\n name unclean-mute\n keep_alive_treatment standard\n inactivity_timeout 300ms\n inactivity_grace 0\n}")},
		layer4Server{w.plain, toAll(echoBackend(t, nil) + " {\n " + limits("plain") + "\n}")},
	), "websocket_proxy "+rawBackend(t, echoRaw))
	w.site = p.addr

	var all sync.WaitGroup
	for i := range clients {
		random := rand.New(rand.NewPCG(1, uint64(i)))
		all.Go(func() {
			n := i % (len(uncleanWays) + 1)
			if n == len(uncleanWays) {
				rudeClient(t, w.site, random)
			} else if err := uncleanWays[n](w, random); err != nil {
				t.Errorf("client of way %d: %v", n, err)
			}
		})
	}
	all.Wait()
	p.waitEmpty(t)
	if s := p.stats(t); len(s.ByRoute) > 0 || len(s.ByState) > 0 || len(s.ByUpstream) > 0 {
		t.Errorf("stats: got %+v, want nothing", s)
	}
	for _, line := range grep(p.scrape(t), "caddy_connections_active{") {
		if strings.Contains(line, "unclean") && !strings.HasSuffix(line, " 0") {
			t.Errorf("gauge: got %s, want 0", line)
		}
	}
	// Who said less than a ClientHello was no connection at all.
	said := float64(3 * (clients/(len(uncleanWays)+1) + 1))
	if got := p.value(t, `caddy_connections_opened_total{kind="passthrough",route="unclean-tls"}`); got == 0 || got > said {
		t.Errorf("connections opened: got %v, want at most %v", got, said)
	}
	// Each limit has all of its room.
	for route, c := range map[string]struct {
		addr string
		says []byte
	}{"unclean-tls": {w.patient, w.hello}, "unclean-plain": {w.plain, []byte("hello")}} {
		var conns []*net.TCPConn
		for range limit {
			c2 := dialTCP(t, c.addr)
			_, _ = c2.Write(c.says)
			conns = append(conns, c2)
		}
		if !eventually(20*time.Second, func() bool { return p.stats(t).ByRoute[route] == limit }) {
			t.Errorf("route %s: got room for %d, want %d", route, p.stats(t).ByRoute[route], limit)
		}
		more := dialTCP(t, c.addr)
		_, _ = more.Write(c.says)
		wantEnd(t, more)
		for _, c := range conns {
			c.Close()
		}
		p.waitEmpty(t)
	}
}

// C59, C64: 2000 tunnels whose inactivity is over at one instant are warned of once each
// and closed, all for that reason; others are served meanwhile.
func TestPassthroughMassTimeout(t *testing.T) {
	const clients, grace = 2000, time.Second
	backend := echoBackend(t, nil)
	mass, other := freeAddr(t), freeAddr(t)
	config := func(settings string) string {
		return layer4Servers("metrics", layer4Server{mass, toAll(backend + " {\n name mass\n" + settings + "\n}")},
			layer4Server{other, toAll(backend + " {\n name other\n}")})
	}
	p := startCaddy(t, config("inactivity_timeout 1h"), "respond ok")
	conns := make([]*net.TCPConn, clients)
	for i := range conns {
		conns[i] = dialTCP(t, mass)
		_, _ = io.WriteString(conns[i], "hello")
	}
	for i, c := range conns {
		_ = c.SetDeadline(time.Now().Add(50 * time.Second))
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatalf("client %d: %v", i, err)
		}
	}
	before := p.stats(t).ClosedByReason["idle"]
	busy := startBabbler(t, other, 1)
	began := time.Now()
	p.reload(t, p.siteConfig(config(fmt.Sprintf("keep_alive_treatment standard\n inactivity_timeout 1ms\n inactivity_grace %v", grace)), "respond ok"))
	ends := make([]time.Duration, clients)
	var all sync.WaitGroup
	for i, c := range conns {
		all.Go(func() {
			if n, err := c.Read(make([]byte, 1)); n > 0 || err != io.EOF {
				t.Errorf("client %d: got %d bytes, %v; want EOF", i, n, err)
			}
			ends[i] = time.Since(began)
			c.Close()
		})
	}
	served := 0
	ended := make(chan struct{})
	go func() { all.Wait(); close(ended) }()
	for over := false; !over; served++ {
		select {
		case <-ended:
			over = true
		default:
		}
		back := busy.back.Load()
		c := dialTCP(t, other)
		wantEcho(t, c, "hello")
		c.Close()
		if !eventually(20*time.Second, func() bool { return busy.back.Load() > back }) {
			t.Fatal("another client is not served")
		}
	}
	slices.Sort(ends)
	if ends[0] < grace {
		t.Errorf("the first one was closed after %v, want %v at the soonest", ends[0], grace)
	}
	p.waitReason(t, "idle", before, clients)
	busy.stop(t)
	p.waitEmpty(t)
	t.Logf("%d tunnels were closed from %v to %v on, and all was gone after %v; %d others were served", clients, ends[0], ends[clients-1], time.Since(began), served)
	if took := time.Since(began); took > grace+20*time.Second {
		t.Errorf("it took %v, want about %v", took, grace)
	}
	if got := p.stats(t).ClosedByReason["idle"] - before; got != clients {
		t.Errorf("closed as idle: got %d, want %d", got, clients)
	}
	if got := p.value(t, `caddy_connections_idle_warnings_total{route="mass"}`); got != clients {
		t.Errorf("warnings: got %v, want one each", got)
	}
}
