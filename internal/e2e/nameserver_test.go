// This file is a DNS server whose answers tests change.

package e2e

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// nameserverInUse is the address of the test's DNS server. The system's resolver, which
// looks up names that are dialed, asks that one, if there is one.
var nameserverInUse atomic.Pointer[string]

func init() {
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		if ours := nameserverInUse.Load(); ours != nil {
			addr = *ours
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}
}

// nameserver answers with what it was told last. It knows every name: one without
// records has none of the type that is asked for.
type nameserver struct {
	addr string

	mu      sync.Mutex
	status  int // of its answers: dns.RcodeSuccess, …
	records []dns.RR
	asked   map[dns.Question]int // since it was told
}

func startNameserver(t testing.TB) *nameserver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &nameserver{addr: conn.LocalAddr().String(), asked: make(map[dns.Question]int)}
	started, done := make(chan struct{}), make(chan error, 1)
	server := &dns.Server{PacketConn: conn, Handler: n, NotifyStartedFunc: func() { close(started) }}
	go func() { done <- server.ActivateAndServe() }()
	<-started
	nameserverInUse.Store(&n.addr)
	t.Cleanup(func() {
		nameserverInUse.Store(nil)
		_ = server.Shutdown()
		if err := <-done; err != nil {
			t.Errorf("DNS server: %v", err)
		}
	})
	return n
}

// tell sets what it answers from now on. Records are written as in a zone file.
func (n *nameserver) tell(t testing.TB, status int, records ...string) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.status, n.records = status, nil
	clear(n.asked)
	for _, text := range records {
		record, err := dns.NewRR(text)
		if err != nil {
			t.Fatalf("record %q: %v", text, err)
		}
		n.records = append(n.records, record)
	}
}

// heard waits until the answers have come to who asks: more of the same questions were
// asked than one lookup asks.
func (n *nameserver) heard(t testing.TB) {
	t.Helper()
	if !eventually(20*time.Second, func() bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, times := range n.asked {
			if times > 3 {
				return true
			}
		}
		return false
	}) {
		t.Fatalf("DNS server: got questions %v, want more", n.asked)
	}
}

// ServeDNS implements dns.Handler.
func (n *nameserver) ServeDNS(w dns.ResponseWriter, question *dns.Msg) {
	n.mu.Lock()
	defer n.mu.Unlock()
	q := question.Question[0]
	n.asked[q]++
	answer := new(dns.Msg)
	answer.SetRcode(question, n.status)
	for _, record := range n.records {
		if h := record.Header(); strings.EqualFold(h.Name, q.Name) && h.Rrtype == q.Qtype {
			answer.Answer = append(answer.Answer, record)
		}
	}
	_ = w.WriteMsg(answer) // a lookup that was given up needs no answer
}

// sharedPort returns addresses on several hosts of the loopback network and one port,
// on all of which nobody listens; and the port.
func sharedPort(t testing.TB, hosts ...string) (addrs []string, port string) {
	t.Helper()
	for range 100 {
		_, port, _ = net.SplitHostPort(freeAddr(t))
		addrs = nil
		for _, host := range hosts {
			addr := net.JoinHostPort(host, port)
			ln, err := net.Listen("tcp", addr)
			if err != nil {
				break
			}
			ln.Close()
			addrs = append(addrs, addr)
		}
		if len(addrs) == len(hosts) {
			return addrs, port
		}
	}
	t.Fatal("no port is free")
	return nil, ""
}

// source is a dynamic source in a Caddyfile, with what every one has.
func (n *nameserver) source(module string, settings ...string) string {
	return fmt.Sprintf("%s {\n %s\n resolvers %s\n refresh 300ms\n }", module, strings.Join(settings, "\n "), n.addr)
}
