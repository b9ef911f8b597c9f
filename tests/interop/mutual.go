// How does grpc-go speak mutual TLS with the mesh? Its own scenarios and its own test server, with the certificates that its programs have
// no flags for. Either side checks the other's SPIFFE ID, as a Go service of the mesh would.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/interop"
	pb "google.golang.org/grpc/interop/grpc_testing"
)

var (
	isServer = flag.Bool("serve", false, "serve instead of calling")
	port     = flag.Int("port", 0, "where, on loopback")
	scenario = flag.String("scenario", "", "what to call for")
	folder   = flag.String("identity", "", "the folder with svid.pem, key.pem and bundle.pem")
	peer     = flag.String("peer", "", "the SPIFFE ID that the other side must have")
	name     = flag.String("name", "", "the DNS name in the server's certificate")
)

// With the stub alone; unimplemented_method and unimplemented_service need something else.
var scenarios = map[string]func(context.Context, pb.TestServiceClient, ...grpc.CallOption){
	"empty_unary":                 interop.DoEmptyUnaryCall,
	"large_unary":                 interop.DoLargeUnaryCall,
	"client_streaming":            interop.DoClientStreaming,
	"server_streaming":            interop.DoServerStreaming,
	"ping_pong":                   interop.DoPingPong,
	"empty_stream":                interop.DoEmptyStream,
	"cancel_after_begin":          interop.DoCancelAfterBegin,
	"cancel_after_first_response": interop.DoCancelAfterFirstResponse,
	"timeout_on_sleeping_server":  interop.DoTimeoutOnSleepingServer,
	"status_code_and_message":     interop.DoStatusCodeAndMessage,
	"special_status_message":      interop.DoSpecialStatusMessage,
	"custom_metadata":             interop.DoCustomMetadata,
}

func main() {
	flag.Parse()
	config, err := identity()
	if err != nil {
		log.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.1", fmt.Sprint(*port))
	if *isServer {
		log.Fatal(serve(address, config))
	}
	if err := call(address, config); err != nil {
		log.Fatal(err)
	}
}

func identity() (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(filepath.Join(*folder, "svid.pem"), filepath.Join(*folder, "key.pem"))
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(filepath.Join(*folder, "bundle.pem"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New("the bundle holds no certificate")
	}
	return &tls.Config{
		Certificates:     []tls.Certificate{own},
		RootCAs:          roots,
		ClientCAs:        roots,
		ClientAuth:       tls.RequireAndVerifyClientCert,
		ServerName:       *name,
		MinVersion:       tls.VersionTLS13,
		VerifyConnection: isPeer,
	}, nil
}

func isPeer(state tls.ConnectionState) error {
	uris := state.PeerCertificates[0].URIs
	if len(uris) != 1 || uris[0].String() != *peer {
		return fmt.Errorf("the other side is %v, not %s", uris, *peer)
	}
	return nil
}

func serve(address string, config *tls.Config) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	pb.RegisterTestServiceServer(server, interop.NewTestServer())
	return server.Serve(listener)
}

func call(address string, config *tls.Config) error {
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx := context.Background()
	if run, is := scenarios[*scenario]; is {
		run(ctx, pb.NewTestServiceClient(connection))
		return nil
	}
	switch *scenario {
	case "unimplemented_method":
		interop.DoUnimplementedMethod(ctx, connection)
	case "unimplemented_service":
		interop.DoUnimplementedService(ctx, pb.NewUnimplementedServiceClient(connection))
	default:
		return fmt.Errorf("there is no scenario %q", *scenario)
	}
	return nil
}
