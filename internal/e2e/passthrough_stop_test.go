// This file tests the end of Caddy with tunnels in all states.

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// loggedStop is what a process has logged of the end of its connections.
type loggedStop struct {
	Msg        string
	Count, Cut int
	Duration   float64
}

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
	flood := tcpBackend(t, func(conn net.Conn) {
		for { // more than a client that does not read has room for
			if _, err := conn.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	deaf := tcpBackend(t, func(net.Conn) { <-t.Context().Done() })
	frozen := startBackend(t, "coder", "frozen")
	to := []string{echoBackend(t, nil), flood, deaf, frozen.addr, fullBacklog(t)}
	addrs := make([]string, len(to))
	var servers []layer4Server
	for i, upstream := range to {
		addrs[i] = freeAddr(t)
		servers = append(servers, layer4Server{addrs[i], toAll(upstream + " {\n dial_timeout 5m\n}")})
	}
	file := filepath.Join(t.TempDir(), "registry.log")
	p := startBinary(t, layer4Servers(fmt.Sprintf("connection_registry {\n shutdown_timeout %v\n}\nlog registry {\noutput file %s\nlevel INFO\ninclude connection_registry\n}", timeout, file), servers...), "respond ok")

	var listening []*net.TCPConn
	for range quiet {
		c := dialTCP(t, addrs[0])
		wantEcho(t, c, "hello")
		listening = append(listening, c)
	}
	var ended []*net.TCPConn
	for range each {
		dialTCP(t, addrs[1])
		half := dialTCP(t, addrs[2])
		_ = half.CloseWrite()
		rawDial(t, addrs[3], "")
		connecting := dialTCP(t, addrs[4])
		_, _ = io.WriteString(connecting, "hello")
		ended = append(ended, half, connecting)
	}
	frozen.freeze(t)
	want := map[string]int{"open": quiet + 2*each, "half_open": each, "connecting": each}
	var got map[string]int
	if !eventually(20*time.Second, func() bool {
		got = p.stats(t).ByState
		return got["open"] == want["open"] && got["half_open"] == want["half_open"] && got["connecting"] == want["connecting"]
	}) {
		t.Fatalf("states: got %v, want %v", got, want)
	}
	// Nothing more fits into the sockets of those who do not read.
	waitStalled(t, &p.proxy, quiet+2*each)

	for _, c := range append(listening, ended...) {
		_ = c.SetDeadline(time.Now().Add(30 * time.Second)) // all of this may have taken its time
	}
	began := time.Now()
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
	select {
	case <-p.exited:
	case <-time.After(30 * time.Second):
		t.Fatal("Caddy does not end")
	}
	took := time.Since(began)
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var logged loggedStop
	for line := range strings.Lines(string(text)) {
		var l loggedStop
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "closed all connections" {
			logged = l
		}
	}
	t.Logf("it ended after %v; its connections, by its own log: %+v", took, logged)
	if logged.Count != quiet+4*each || logged.Cut > each {
		t.Errorf("log: got %+v, want %d connections, of which those are cut that take no bytes, %d at most", logged, quiet+4*each, each)
	}
	if own := time.Duration(logged.Duration * float64(time.Second)); own > timeout+time.Second || own == 0 {
		t.Errorf("the end of the connections took %v, want at most %v", own, timeout+time.Second)
	}
	if took > timeout+slack+2*time.Second {
		t.Errorf("the stop took %v, want about %v", took, timeout)
	}
}
