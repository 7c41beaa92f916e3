// This file tests that a TLS connection goes on without the config of its
// handshake, and that the config is free then.

package sock

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"runtime"
	"testing"
	"time"
	"weak"
)

func TestThisGoVersionIsSupported(t *testing.T) {
	if !CanForgetTLSConfig() {
		t.Fatalf("got no way to forget a TLS config with %s: crypto/tls has changed, every reload keeps an old config", runtime.Version())
	}
}

// What TLS has read ahead is not in the socket any more.
func TestHeld(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			server, client, _ := tlsPair(t, version)
			if _, err := client.Write(make([]byte, 100)); err != nil {
				t.Fatal(err)
			}
			if n, err := io.ReadFull(server, make([]byte, 10)); err != nil {
				t.Fatal(n, err)
			}
			if got := Held(server); got != 90 {
				t.Errorf("got %d bytes held, want 90: crypto/tls may have changed", got)
			}
			if got := Held(server.NetConn()); got != 0 {
				t.Errorf("got %d bytes held by a socket, want 0", got)
			}
		})
	}
}

// certificate makes one for localhost.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// tlsPair makes a connection whose handshake is complete. The server's config is
// weakly referenced: nothing but the connection may keep it.
func tlsPair(t *testing.T, version uint16) (server, client *tls.Conn, config weak.Pointer[tls.Config]) {
	t.Helper()
	cert, pool := certificate(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = far.Close() })
	_ = near.SetDeadline(time.Now().Add(10 * time.Second))
	_ = far.SetDeadline(time.Now().Add(10 * time.Second))

	// As Caddy does: the config that counts is another, chosen by a callback.
	own := &tls.Config{Certificates: []tls.Certificate{cert}, MaxVersion: version}
	outer := &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return own, nil }}
	server = tls.Server(far, outer)
	client = tls.Client(near, &tls.Config{ServerName: "localhost", RootCAs: pool, MaxVersion: version})
	shaken := make(chan error, 1)
	go func() { shaken <- client.Handshake() }() // ends with the handshake or the deadline
	if err := server.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-shaken; err != nil {
		t.Fatal(err)
	}
	return server, client, weak.Make(own)
}

func TestTLSGoesOnWithoutItsConfig(t *testing.T) {
	for name, version := range map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13} {
		t.Run(name, func(t *testing.T) {
			server, client, config := tlsPair(t, version)
			before := server.ConnectionState()
			ForgetTLSConfig(server)

			echoed := make(chan error, 1)
			go func() { // ends with the client's close_notify
				_, err := io.Copy(server, server)
				if err == nil {
					err = server.CloseWrite()
				}
				echoed <- err
			}()
			for _, size := range []int{1, 100, 16 << 10, 1 << 20} {
				sent := make([]byte, size)
				_, _ = rand.Read(sent)
				wrote := make(chan error, 1)
				go func() { // ends when the echo has taken all
					_, err := client.Write(sent)
					wrote <- err
				}()
				got := make([]byte, size)
				if _, err := io.ReadFull(client, got); err != nil {
					t.Fatalf("%d bytes: %v", size, err)
				}
				if err := <-wrote; err != nil || !bytes.Equal(got, sent) {
					t.Fatalf("%d bytes: got another echo, error %v", size, err)
				}
			}
			after := server.ConnectionState()
			if after.Version != before.Version || after.CipherSuite != before.CipherSuite || after.ServerName != "localhost" {
				t.Errorf("got version %x, suite %x, name %q, want what was before", after.Version, after.CipherSuite, after.ServerName)
			}
			for until := time.Now().Add(5 * time.Second); config.Value() != nil; runtime.GC() {
				if time.Now().After(until) {
					t.Fatal("got the config kept in memory, want it free")
				}
			}
			if err := client.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("got error %v at the end, want EOF by close_notify", err)
			}
			if err := <-echoed; err != nil {
				t.Errorf("got error %v from the echo, want none", err)
			}
			if err := server.Close(); err != nil {
				t.Errorf("got error %v from Close, want none", err)
			}
		})
	}
}

// Without the call the config stays: else the test above would prove nothing.
func TestTLSKeepsItsConfigOtherwise(t *testing.T) {
	server, _, config := tlsPair(t, tls.VersionTLS13)
	for range 5 {
		runtime.GC()
	}
	if config.Value() == nil {
		t.Error("got the config free without ForgetTLSConfig: it is not needed any more")
	}
	runtime.KeepAlive(server)
}

// Before the handshake is complete the config is still needed.
func TestForgetBeforeTheHandshakeDoesNothing(t *testing.T) {
	near, far := net.Pipe()
	t.Cleanup(func() { _, _ = near.Close(), far.Close() })
	deadline := time.Now().Add(10 * time.Second)
	_, _ = near.SetDeadline(deadline), far.SetDeadline(deadline)
	cert, pool := certificate(t)
	server := tls.Server(far, &tls.Config{Certificates: []tls.Certificate{cert}})
	ForgetTLSConfig(server)
	client := tls.Client(near, &tls.Config{ServerName: "localhost", RootCAs: pool})
	shaken := make(chan error, 1)
	go func() { shaken <- server.Handshake() }() // ends with the handshake or the deadline
	if err := client.Handshake(); err != nil {
		t.Errorf("got error %v, want the handshake to succeed", err)
	}
	if err := <-shaken; err != nil {
		t.Errorf("got error %v from the server, want none", err)
	}
}

func TestTwoConnectionsShareNothingThatHurts(t *testing.T) {
	a, peerA, _ := tlsPair(t, tls.VersionTLS13)
	b, peerB, _ := tlsPair(t, tls.VersionTLS12)
	ForgetTLSConfig(a)
	ForgetTLSConfig(b)
	done := make(chan error, 2)
	for _, both := range [][2]*tls.Conn{{a, peerA}, {b, peerB}} {
		go func() { // ends after 100 messages
			var err error
			p := make([]byte, 4)
			for i := 0; i < 100 && err == nil; i++ {
				if _, err = both[0].Write([]byte("ping")); err == nil {
					_, err = io.ReadFull(both[1], p)
				}
			}
			done <- err
		}()
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
