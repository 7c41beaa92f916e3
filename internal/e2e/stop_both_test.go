// This file stops Caddy while it has connections of both kinds, in every condition.

package e2e

import (
	bits "encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// stopReport is what Caddy logs when it has ended all connections.
type stopReport struct {
	Msg        string
	Count, Cut int
	Duration   float64 // seconds
}

// stopReport waits until Caddy has ended, in good order, and returns what it reports.
func (p *process) stopReport(t testing.TB) stopReport {
	t.Helper()
	select {
	case <-p.exited:
	case <-time.After(2 * time.Minute):
		t.Fatal("Caddy does not end")
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code: got %d", code)
	}
	for line := range strings.Lines(p.log.String()) {
		var s stopReport
		if json.Unmarshal([]byte(line), &s) == nil && s.Msg == "closed all connections" {
			t.Logf("the stop: %+v", s)
			return s
		}
	}
	t.Fatal("Caddy has not logged that it closed all connections")
	return stopReport{}
}

// stop stops Caddy by its command, has something done as soon as new upgrades are refused,
// and returns what Caddy reports.
func (p *process) stop(t testing.TB, meanwhile func()) stopReport {
	t.Helper()
	path, _ := binary()
	stop := exec.Command(path, "stop", "--address", p.admin)
	if err := stop.Start(); err != nil {
		t.Fatal(err)
	}
	if !eventually(15*time.Second, func() bool { return refusesUpgrades(p.addr) }) {
		t.Error("new upgrades are not refused with 503 while Caddy stops")
	}
	meanwhile()
	report := p.stopReport(t)
	if err := stop.Wait(); err != nil {
		t.Errorf("caddy stop: %v", err)
	}
	return report
}

// wantOver checks how long it took to end all connections, some of which were cut: all of
// shutdown_timeout and, on a machine that is not busy, not more than a second besides.
func (r stopReport) wantOver(t testing.TB, shutdownTimeout time.Duration) {
	t.Helper()
	took := time.Duration(r.Duration * float64(time.Second))
	if took < shutdownTimeout || took > shutdownTimeout+time.Second+slack {
		t.Errorf("the stop took %v, want %v, since there are clients that do not read, and at most a second more", took, shutdownTimeout)
	}
}

// openAt opens n WebSockets at a path, for clients that have time.
func (p *proxy) openAt(t testing.TB, n int, path string) (conns []*rawConn) {
	t.Helper()
	for range n {
		res, c := rawRequest(t, p.addr, pathed(p.addr, path, ""))
		if res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%s: status %d", path, res.StatusCode)
		}
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		conns = append(conns, c)
	}
	return conns
}

// A stop with 1000 WebSockets and 500 tunnels, in every condition: all that read are told,
// after what was in flight; those that do not are cut in the end, and not before.
func TestStopOfBothKinds(t *testing.T) {
	const shutdownTimeout = 4 * time.Second // less than the closing handshakes may take
	const floods = 20                       // of each sort: they fill much of the kernel's memory
	quiet, held, moving, frozen, tunnels, halfOpen := long2(140, 620), long2(30, 100), long2(30, 100), long2(30, 70), long2(50, 300), long2(20, 60)
	hold := make(chan struct{})
	t.Cleanup(func() { close(hold) })
	silent := tcpBackend(t, func(net.Conn) { <-hold })
	dies, freezes := startBackend(t, "coder", "dies"), startBackend(t, "coder", "freezes")
	old := startWitness(t)
	var told atomic.Int64
	listens := tcpBackend(t, func(conn net.Conn) {
		if _, err := io.Copy(io.Discard, struct{ io.Reader }{conn}); err == nil {
			told.Add(1)
		}
	})
	forTunnels, forHalfOpen, forFloods, forFrozen := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t)
	var servers strings.Builder
	for addr, backend := range map[string]string{
		forTunnels: listens, forHalfOpen: silent, forFloods: tcpBackend(t, pour) + " {\n name poured\n}", forFrozen: freezes.addr,
	} {
		fmt.Fprintf(&servers, "%s {\n%s}\n", addr, toAll(backend))
	}
	p := startBinary(t, fmt.Sprintf("%sconnection_registry {\n shutdown_timeout %s\n}\nlayer4 {\n%s}", logsNotices, shutdownTimeout, &servers),
		fmt.Sprintf(`websocket_proxy %s
	websocket_proxy /flood %s {
		name flooded
		write_timeout 5m
	}
	websocket_proxy /held %s {
		resume_timeout 5m
	}
	websocket_proxy /move %s %s {
		name moving
		lb_policy first
		handshake_timeout 5m
		drain_window 0
	}
	websocket_proxy /frozen %s`, rawBackend(t, echoRaw), rawBackend(t, floodRaw), dies.addr, old.addr, silent, freezes.addr))

	var readers []*rawConn
	for path, n := range map[string]int{"/quiet": quiet, "/held": held, "/move": moving, "/frozen": frozen, "/flood": floods} {
		readers = append(readers, p.openAt(t, n, path)...)
	}
	deaf := p.openAt(t, floods, "/flood")
	var ended, laden []*net.TCPConn
	tunnel := func(n int, addr string) (conns []*net.TCPConn) {
		for range n {
			c := dialTCP(t, addr)
			_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
			conns = append(conns, c)
		}
		return conns
	}
	ended = append(ended, tunnel(tunnels, forTunnels)...)
	ended = append(ended, tunnel(frozen, forFrozen)...)
	half := tunnel(halfOpen, forHalfOpen)
	ended = append(ended, half...)
	laden = tunnel(floods/4, forFloods) // they have to read it all before they are cut
	deafTunnels := tunnel(floods, forFloods)
	strangers := []*exec.Cmd{
		startClients(t, frozen, p.addr, pathed(p.addr, "/quiet", "")),
		startClients(t, frozen, forTunnels, "hello"),
	}
	total := len(readers) + len(deaf) + len(ended) + len(laden) + len(deafTunnels) + 2*frozen
	p.waitCount(t, total)

	for _, cmd := range strangers {
		if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range half { // they are through: one that ends while a backend is dialed is gone
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	freezes.freeze(t)
	kill(t, dies)
	p.drain(t, old.addr, "moving")
	var s stats
	if !eventually(20*time.Second, func() bool {
		s = p.stats(t)
		return s.ByState["held"] == held && s.ByState["migrating"] == moving && s.ByState["half_open"] == halfOpen
	}) {
		t.Fatalf("states: got %v, want %d held, %d migrating, %d half open", s.ByState, held, moving, halfOpen)
	}
	p.stalls(t, "flooded", 2*floods)
	inFlight := p.stalls(t, "poured", len(laden)+len(deafTunnels))

	report := p.stop(t, func() {
		var all sync.WaitGroup
		for _, c := range readers {
			all.Go(func() { expectRestart(t, c) })
		}
		for _, c := range ended {
			all.Go(func() { wantFIN(t, c) })
		}
		for _, c := range laden {
			all.Go(func() { wantPoured(t, c, inFlight) })
		}
		all.Wait()
	})
	report.wantOver(t, shutdownTimeout)
	if report.Count < total || report.Cut < len(deaf)+len(deafTunnels) {
		t.Errorf("got %d connections and %d cut, want at least %d and the %d that do not read", report.Count, report.Cut, total, len(deaf)+len(deafTunnels))
	}
	if !eventually(10*time.Second, func() bool { return int(told.Load()) == tunnels+frozen }) {
		t.Errorf("backends of quiet tunnels: got %d that saw a FIN, want all %d", told.Load(), tunnels+frozen)
	}
}

// A stop does not wait for longer than its clients do.
func TestStopOfBothKindsIsOverWithTheLastConnection(t *testing.T) {
	webSockets, tunnels := long2(300, 1000), long2(150, 500)
	addr := freeAddr(t)
	p := startBinary(t, logsNotices+"connection_registry {\n shutdown_timeout 2m\n}\nlayer4 {\n"+addr+" {\n"+toAll(echoBackend(t, nil))+"}\n}",
		"websocket_proxy "+rawBackend(t, echoRaw))
	var all sync.WaitGroup
	for range webSockets {
		c := rawDial(t, p.addr, "")
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		all.Go(func() { expectRestart(t, c) })
	}
	for range tunnels {
		c := dialTCP(t, addr)
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
		all.Go(func() {
			wantFIN(t, c)
			c.Close()
		})
	}
	p.waitCount(t, webSockets+tunnels)
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	all.Wait()
	report := p.stopReport(t)
	if report.Count != webSockets+tunnels || report.Cut != 0 || report.Duration > 30 {
		t.Errorf("got %+v, want %d connections, none cut, and it over long before the two minutes", report, webSockets+tunnels)
	}
}

// floodRaw is a backend that sends more than a client that does not read has room for.
func floodRaw(r *http.Request, c *rawConn) {
	if c.accept(r) != nil {
		return
	}
	chunk := ws.MustCompileFrame(ws.NewBinaryFrame(make([]byte, 60<<10)))
	for {
		if _, err := c.Write(chunk); err != nil {
			return
		}
	}
}

// poured is the size of the blocks that pour sends.
const poured = 4 << 10

// pour sends blocks that begin with their numbers, until nobody takes them any more.
func pour(conn net.Conn) {
	block := make([]byte, poured)
	for n := uint64(0); ; n++ {
		bits.BigEndian.PutUint64(block, n)
		if _, err := conn.Write(block); err != nil {
			return
		}
	}
}

// wantPoured reads what pour sends and wants all of it in order, at least as many bytes
// as given, and then a FIN.
func wantPoured(t *testing.T, conn net.Conn, least uint64) {
	block := make([]byte, poured)
	for n := uint64(0); ; n++ {
		last, err := io.ReadFull(conn, block)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			if got := poured*n + uint64(last); got < least {
				t.Errorf("got a FIN after %d bytes, want the %d that were in flight before it", got, least)
			}
			return
		}
		if err != nil {
			t.Errorf("got %v after %d blocks, want a FIN after what was in flight", err, n)
			return
		}
		if got := bits.BigEndian.Uint64(block); got != n {
			t.Errorf("got block %d, want %d", got, n)
			return
		}
	}
}

// wantFIN wants a FIN and not a byte before it.
func wantFIN(t *testing.T, conn net.Conn) {
	if n, err := conn.Read(make([]byte, 1)); n > 0 || err != io.EOF {
		t.Errorf("got %d bytes, %v; want a FIN", n, err)
	}
}

// stalls waits until n connections of a route have been sent something and no more goes
// out to any, and returns how much the least of them was sent.
func (p *proxy) stalls(t testing.TB, route string, n int) (least uint64) {
	t.Helper()
	var last uint64
	if !eventually(30*time.Second, func() bool {
		pass(200 * time.Millisecond)
		var list struct{ Connections []connection }
		p.call(t, http.MethodGet, "/connections?limit=1000&route="+route, &list)
		sum := uint64(0)
		least = 1 << 62
		for _, c := range list.Connections {
			sum += c.BytesOut
			least = min(least, c.BytesOut)
		}
		still := len(list.Connections) == n && least > 0 && sum == last
		last = sum
		return still
	}) {
		t.Fatalf("the flood of route %s does not stall", route)
	}
	return least
}

// drain has the connections of a route leave an upstream.
func (p *proxy) drain(t testing.TB, upstream, route string) {
	t.Helper()
	res, err := http.Post("http://"+p.admin+"/connections/drain", "application/json", strings.NewReader(fmt.Sprintf(`{"upstream":%q,"route":%q}`, upstream, route)))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Fatalf("drain: status %d", res.StatusCode)
	}
}

// startClients starts a process with n connections that have each sent a request, of which it
// reads none. It is killed when the test ends.
func startClients(t testing.TB, n int, addr, request string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(tool(t, "/usr/bin/python3"), "-c", pythonClients, addr, fmt.Sprint(n), request)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}
