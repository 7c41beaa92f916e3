// This file does TLS with upstreams.

package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/caddyserver/caddy/v2"

	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
)

// config returns what one handshake goes by, or nil if there is to be none.
func (d *Dialer) config(r Request) (*tls.Config, error) {
	if !r.TLS {
		return nil, nil
	}
	var host, port string
	if !caddy.IsUnixNetwork(r.Network) {
		var err error
		if host, port, err = net.SplitHostPort(r.Address); err != nil {
			return nil, err
		}
		if slices.Contains(d.except, port) {
			return nil, nil
		}
	}
	config := d.tls.Clone()
	switch {
	case config.ServerName == "":
		config.ServerName = host
	case r.Replace != nil:
		// What is configured must not turn into the default when it is empty.
		if config.ServerName = r.Replace(config.ServerName); config.ServerName == "" {
			return nil, fmt.Errorf("tls_server_name %q is empty", d.tls.ServerName)
		}
	}
	if config.ServerName == "" && !config.InsecureSkipVerify {
		return nil, errors.New("a Unix socket has no name to verify: tls_server_name must say it")
	}
	return config, nil
}

// handshake does a handshake, which ends with ctx. The caller closes conn if it
// fails.
func (d *Dialer) handshake(ctx context.Context, conn net.Conn, config *tls.Config) (*tls.Conn, error) {
	if d.tlsTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.tlsTimeout)
		defer cancel()
	}
	secured := tls.Client(conn, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	// The connection may live for days, and needs its config, a copy of its own, no
	// more, but for renegotiation, which TLS 1.3 does not have.
	if config.Renegotiation == tls.RenegotiateNever || secured.ConnectionState().Version >= tls.VersionTLS13 {
		sock.ForgetTLSConfig(secured)
	}
	return secured, nil
}
