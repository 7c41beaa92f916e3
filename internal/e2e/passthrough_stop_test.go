// This file tests the end of Caddy with tunnels in all states.

package e2e

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// A stop with 500 tunnels, many of which have nobody at one end, are half open or have
// not found an upstream yet, is over within shutdown_timeout and a second; those that
// listen get a FIN.
func TestPassthroughStopWithTheDead(t *testing.T) {
	t.Parallel() // with nothing but itself: each runs a Caddy of its own, and mostly waits
	for name, stop := range map[string]func(p *process) error{
		"caddy stop": func(p *process) error {
			path, _ := binary()
			return exec.Command(path, "stop", "--address", p.admin).Run()
		},
		"SIGTERM": func(p *process) error { return p.cmd.Process.Signal(syscall.SIGTERM) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testStopWithTheDead(t, stop)
		})
	}
}

func testStopWithTheDead(t *testing.T, stop func(p *process) error) {
	const quiet, each, timeout = 300, 50, 3 * time.Second
	flood := tcpBackend(t, pour)
	deaf := tcpBackend(t, func(net.Conn) { <-t.Context().Done() })
	frozen := startBackend(t, "coder", "frozen")
	to := []string{echoBackend(t, nil), flood, deaf, frozen.addr, fullBacklog(t)}
	addrs := make([]string, len(to))
	var servers []layer4Server
	for i, upstream := range to {
		addrs[i] = freeAddr(t)
		servers = append(servers, layer4Server{addrs[i], toAll(fmt.Sprintf("%s {\n name backend%d\n dial_timeout 5m\n}", upstream, i))})
	}
	p := startBinary(t, layer4Servers(fmt.Sprintf("%sconnection_registry {\n shutdown_timeout %v\n}", logsNotices, timeout), servers...), "respond ok")

	var listening []*net.TCPConn
	for range quiet {
		c := dialTCP(t, addrs[0])
		wantEcho(t, c, "hello")
		listening = append(listening, c)
	}
	var half, ended []*net.TCPConn
	for range each {
		dialTCP(t, addrs[1])
		half = append(half, dialTCP(t, addrs[2]))
		rawDial(t, addrs[3], "")
		connecting := dialTCP(t, addrs[4])
		_, _ = io.WriteString(connecting, "hello")
		ended = append(ended, connecting)
	}
	var got map[string]int
	if !eventually(20*time.Second, func() bool { got = p.stats(t).ByState; return got["open"] == quiet+3*each }) {
		t.Fatalf("states: got %v, want %d open", got, quiet+3*each)
	}
	for _, c := range half { // not before: one that ends while a backend is dialed is gone
		_ = c.CloseWrite()
	}
	ended = append(ended, half...)
	frozen.freeze(t)
	want := map[string]int{"open": quiet + 2*each, "half_open": each, "connecting": each}
	if !eventually(20*time.Second, func() bool {
		got = p.stats(t).ByState
		return got["open"] == want["open"] && got["half_open"] == want["half_open"] && got["connecting"] == want["connecting"]
	}) {
		t.Fatalf("states: got %v, want %v", got, want)
	}
	// Nothing more fits into the sockets of those who do not read.
	p.stalls(t, "backend1", each)

	for _, c := range append(listening, ended...) {
		_ = c.SetDeadline(time.Now().Add(30 * time.Second)) // all of this may have taken its time
	}
	if err := stop(p); err != nil {
		t.Fatal(err)
	}
	for i, c := range listening {
		if n, err := c.Read(make([]byte, 1)); n > 0 || err != io.EOF {
			t.Fatalf("quiet client %d: got %d bytes, %v; want EOF", i, n, err)
		}
	}
	for _, c := range ended {
		wantEnd(t, c)
	}
	report := p.stopReport(t)
	if report.Count != quiet+4*each || report.Cut != each {
		t.Errorf("got %d connections and %d cut, want %d, of which those are cut that take no bytes: %d", report.Count, report.Cut, quiet+4*each, each)
	}
	if took := time.Duration(report.Duration * float64(time.Second)); took > timeout+time.Second+slack || took == 0 {
		t.Errorf("the stop took %v, want %v and, on a machine that is not busy, at most a second more", took, timeout)
	}
}
